"""The clock that engines read and wait by: the machine's, or a simulator's."""

import time
from collections.abc import Generator
from contextlib import contextmanager


class Clock:
    """`time.perf_counter()`."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class VirtualClock(Clock):
    """Time that passes only where somebody sets it: `time`, in seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


_clock = Clock()


def now() -> float:
    """Seconds on the clock in use."""
    return _clock.now()


def sleep(seconds: float) -> None:
    _clock.sleep(seconds)


@contextmanager
def using(clock: Clock) -> Generator[None]:
    """All engines of the process read this clock while the block runs."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
