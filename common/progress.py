"""Progress bars for long work."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    def __call__(self, amount: int, note: str = "") -> None:
        """`amount` more is done; a note stands behind the bar's description."""
        ...


@contextmanager
def progress_bar(description: str, total: int, *, show: bool | None = None) -> Generator[Advance, None, None]:
    """Yield `advance(amount)`. `show=None` draws the bar only where standard error is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda amount, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)

        def advance(amount: int, note: str = "") -> None:
            bar.update(task, advance=amount, description=f"{description} {note}".rstrip())

        yield advance
