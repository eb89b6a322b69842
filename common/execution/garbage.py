"""Python's garbage collector, kept from stopping an engine in the middle of a step."""

import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager

_CAPTURING = threading.Lock()


class OldObjects:
    """The hundreds of thousands of objects that exist when an engine begins to work: a tokenizer's, PyTorch's. Going
    through them takes the collector a tenth of a second; it leaves them alone until the engine is idle. What comes
    meanwhile is collected as ever."""

    def __init__(self) -> None:
        self._frozen = False

    def leave_alone(self, working: bool) -> None:
        if working != self._frozen:
            self._frozen = working
            (gc.freeze if working else gc.unfreeze)()


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """The garbage collector may free another engine's tensors, graphs and events, by calls that CUDA forbids during a
    capture. Both the collector and the ban are the whole process's: one engine captures at a time."""
    with _CAPTURING:
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
