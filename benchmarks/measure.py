"""What is measured of a run besides its tokens: how busy the GPU was, and the time in attention."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Self

import torch

from common.attention import Attention

SAMPLE_EVERY = 0.1  # seconds
ATTENDS = ("attend", "fused_qkv")


@contextmanager
def gpu_utilization(device: torch.device) -> Generator[list[float]]:
    """Samples of the share of time in which a kernel runs, by NVML, while its block runs; none on a CPU, or where
    `nvidia-ml-py` is not installed."""
    samples: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        with suppress(ImportError, RuntimeError):
            while not stop.wait(SAMPLE_EVERY):
                samples.append(torch.cuda.utilization(device) / 100)

    thread = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield samples
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


class AttentionClock:
    """While its block runs, adds up the time inside `attention.attend`, storing K and V included, or `fused_qkv`, which
    also normalises and rotates.

    On a GPU it is the stream's time between an event before and one after each call: if the CPU launches kernels more
    slowly than the GPU computes them, the gaps count too.
    expected_calls: how many calls the run should have made. Steps replayed from a CUDA graph call nothing.
    """

    def __init__(self, attention: Attention, device: torch.device, expected_calls: Callable[[], int]) -> None:
        self._attention = attention
        self._on_gpu = device.type == "cuda"
        self._expected_calls = expected_calls
        self._calls: list[tuple[Any, Any]] = []  # begin and end: events of the GPU, or seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, attend: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        begin = self._now()
        out = attend(*arguments)
        self._calls.append((begin, self._now()))
        return out

    def __enter__(self) -> Self:
        for name in ATTENDS:
            if (attend := getattr(self._attention, name, None)) is not None:
                timed = partial(self._timed, attend)
                vars(timed)["__self__"] = self._attention  # fused operations read the owner of the method
                vars(self._attention)[name] = timed  # hides the class's, for this one object
        return self

    def __exit__(self, *_: object) -> None:
        for name in ATTENDS:
            vars(self._attention).pop(name, None)

    def seconds(self) -> float | None:
        """None if some steps went past the clock: part of a time would look like a win."""
        if len(self._calls) != self._expected_calls():
            return None
        if not self._on_gpu:
            return sum(end - begin for begin, end in self._calls)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._calls) / 1e3
