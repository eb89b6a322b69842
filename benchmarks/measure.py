"""Peak memory of this process and of the device, and how busy the GPU was."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from types import TracebackType

import torch

from common.config import parse_device

SAMPLE_EVERY = 0.1  # seconds


def reset_peak_memory() -> bool:
    """Start the peaks anew, so that loading and converting weights do not hide what running needs.

    The process's peak can only be reset on Linux; elsewhere (False) it counts from the process's start.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> tuple[int | None, int | None]:
    """Bytes: the process's largest resident set, and the most that PyTorch held on the GPU (None without one)."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    return _peak_resident(), device


def _peak_resident() -> int | None:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ActivationPeak:
    """The most memory, in bytes, that its block holds over what was there before it.

    On a GPU that is PyTorch's own count. On a CPU it is the resident set, which can be off by a megabyte or two, and
    None where the system cannot reset its peak. Weights and KV cache must have been touched before.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> ActivationPeak:
        with contextlib.suppress(OSError, AttributeError):  # hand back what earlier runs freed: it would hide as much
            ctypes.CDLL(None).malloc_trim(0)
        self._known = reset_peak_memory() or self._device.type == "cuda"
        self._before = self._peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        after = self._peak()
        if self._known and self._before is not None and after is not None:
            self.bytes = after - self._before

    def _peak(self) -> int | None:
        """Right after a reset: what is there now."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_resident()


class DeviceUse:
    """Samples the GPU's utilisation (share of time in which a kernel runs, by NVML) while its block runs.

    `mean` is in 0 ... 1; None on a CPU, or where `nvidia-ml-py` is not installed.
    """

    def __init__(self, device: str) -> None:
        self._device = parse_device(device)
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY):
            try:
                self._samples.append(torch.cuda.utilization(self._device) / 100)
            except (ImportError, RuntimeError):
                return

    def __enter__(self) -> DeviceUse:
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def mean(self) -> float | None:
        return sum(self._samples) / len(self._samples) if self._samples else None
