"""Progress bars for long work, and lines that say what takes so long; or both to whoever listens instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    def __call__(self, amount: int, note: str = "") -> None:
        """`amount` more is done; a note stands behind the bar's description."""
        ...


Listener = Callable[[str, int, int], None]
"""(what, done, total) of a bar; (line, 0, 0) for a line."""

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Generator[None, None, None]:
    """Within, bars and lines go to the listener: for a process whose output nobody sees."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def say(line: str) -> None:
    """One line on standard error."""
    if _listeners:
        _listeners[-1](line, 0, 0)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, total: int, *, show: bool | None = None) -> Generator[Advance, None, None]:
    """Yield `advance(amount)`. `show=None` draws the bar where standard error is a terminal, or tells a listener."""
    if show is None and _listeners:
        done = 0

        def tell(amount: int, note: str = "") -> None:
            nonlocal done
            done += amount
            _listeners[-1](f"{description} {note}".rstrip(), done, total)

        yield tell
        return
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
