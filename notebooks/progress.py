"""A line under a cell that says what takes so long, for as long as it does."""

import time
from typing import Any

from common.watch.progress import listen

MARK = {"progress": True}  # the metadata of such a line. `execute` keeps none
EVERY = 0.5  # seconds between two updates


class CellLine:
    """A listener for `common.watch.progress`. Each cell has a line of its own, of which the time stays."""

    shown: Any = None
    began = updated = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.shown is None:
            self.began = now
        elif now - self.updated < EVERY and done < total:
            return
        self.updated = now
        count = f": {done:,} of {total:,}" if total > 1 else ""
        self.show(f"{what}{count}, {now - self.began:.0f} s")

    def end(self, result: object = None) -> None:
        if self.shown is not None:
            self.show(f"{time.perf_counter() - self.began:.0f} s")
        self.shown = None

    def show(self, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text}
        if self.shown is None:
            self.shown = display(data, raw=True, display_id=True, metadata=MARK)
        else:
            self.shown.update(data, raw=True, metadata=MARK)


def show_progress() -> None:
    """In a notebook, from now on: what is loaded, measured and quantised shows its progress under its cell."""
    from IPython.core.getipython import get_ipython

    if (shell := get_ipython()) is not None:
        listen(line := CellLine())
        shell.events.register("post_run_cell", line.end)
