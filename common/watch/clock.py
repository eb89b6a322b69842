"""The clock that engines read and wait by: the machine's, or a simulator's."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class VirtualClock:
    """Time that passes only where it is set, in seconds."""

    time: float = 0.0


_virtual: VirtualClock | None = None


def now() -> float:
    """Seconds: `time.perf_counter()`, or a virtual time."""
    return time.perf_counter() if _virtual is None else _virtual.time


def sleep(seconds: float) -> None:
    if _virtual is None:
        time.sleep(seconds)
    else:
        _virtual.time += seconds


@contextmanager
def using(clock: VirtualClock) -> Generator[None]:
    """All engines of the process read this clock while the block runs."""
    global _virtual
    before, _virtual = _virtual, clock
    try:
        yield
    finally:
        _virtual = before
