"""A line under a cell that says what takes so long, for as long as it does."""

from __future__ import annotations

import time
from typing import Any

from common.watch.progress import listen

MARK = {"progress": True}
"""The metadata of such a line. `execute` keeps none."""
EVERY = 0.5
"""Seconds between two updates."""


class CellLine:
    """A listener for `common.watch.progress`. One line for each cell: the next cell starts another."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._began = self._updated = 0.0
        self._said = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if not total:
            self._said = what + "\n"
        elif self._shown and now - self._updated < EVERY and done < total:
            return
        self._updated = now
        self._began = now if self._shown is None else self._began
        counted = f"{what}: {done:,} of {total:,}, " if total > 1 else f"{what}, " if total else ""
        self._show(f"{self._said}{counted}{now - self._began:.0f} s")

    def end(self, result: object = None) -> None:
        """The cell has ended: only its time stays."""
        if self._shown is not None:
            self._show(f"{time.perf_counter() - self._began:.0f} s")
        self._shown, self._said = None, ""

    def _show(self, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True, metadata=MARK)
        else:
            self._shown.update(data, raw=True, metadata=MARK)


def show_progress() -> None:
    """In a notebook: what is loaded, measured and quantised from now on shows its progress under its cell."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is not None:
        line = CellLine()
        listen(line)
        shell.events.register("post_run_cell", line.end)
