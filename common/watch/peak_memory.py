"""The memory that is free, and the most that a process, or a part of its work, held at one time."""

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

from common.errors import require


def free_memory(device: torch.device) -> int:
    """Bytes, within a container's limit; on a CPU without /proc/meminfo, half of what is installed."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch keeps it
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _container_free())


def _container_free(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a control group (version 2) leaves; a huge number where there is no limit."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**62
    return max(0, int(limit.read_text()) - int(used.read_text()))


def require_memory(what: str, needed: int, device: torch.device, hint: str = "take a smaller model or dtype") -> None:
    """`UserError` where that many bytes are not free, before anything is made of them."""
    free = free_memory(device)
    require(needed <= free, f"{what} would take {needed:,} bytes, and {free:,} are free on {device}: {hint}")


def reset_peak_memory() -> bool:
    """Forget the peaks of loading and converting weights. The process's peak can only be reset on Linux; elsewhere
    (False) it counts from the process's start."""
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
    if found := re.search(r"^VmHWM:\s+(\d+)", status.read_text() if status.exists() else "", re.M):
        return int(found[1]) * 1024
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ActivationPeak:
    """The most memory, in bytes, that its block holds over what was there before it, weights and KV cache included.

    On a GPU that is PyTorch's count; on a CPU the resident set, to a megabyte or two; None where it cannot be reset.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        with suppress(OSError, AttributeError):  # hand back what earlier runs freed: it would hide as much
            ctypes.CDLL(None).malloc_trim(0)
        self._known = reset_peak_memory() or self._device.type == "cuda"
        self._before = self._peak()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._peak()
        if self._known and self._before is not None and after is not None:
            self.bytes = max(0, after - self._before)  # Linux counts in batches: a peak may seem to fall

    def _peak(self) -> int | None:
        """Right after a reset: what is there now."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_resident()
