"""A second queue of the device, for copies that would hold up the work in the first one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class SideStream:
    """What is put here runs beside the work of the current stream, not between two of its kernels. On a CPU there are
    no queues: it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, copy: Callable[[], None], after: torch.cuda.Event | None = None) -> None:
        """Queue copies, behind what an event of another stream marks. Whoever calls keeps the memory that they read and
        write until they are done: the allocator knows only of the stream in which it was taken."""
        if self._stream is None:
            copy()
            return
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            copy()

    def mark(self) -> torch.cuda.Event | None:
        """An event behind everything that was put here so far; None where that is done."""
        return None if self._stream is None else self._stream.record_event()

    def join(self) -> None:
        """What the current stream gets from now on waits for everything that was put here so far; the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
