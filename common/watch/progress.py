"""Progress bars for long work, and lines that say what takes so long; a listener can take both."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Protocol


class Advance(Protocol):
    def __call__(self, amount: int, note: str = "") -> None:
        """`amount` more is done; a note follows the bar's description."""


Listener = Callable[[str, int, int], None]  # (what, done, total) of a bar; (line, 0, 0) for a line

_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Generator[None, None, None]:
    """Within, this thread's bars and lines go to the listener instead of to standard error."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def listen(listener: Listener) -> None:
    """`listening` without an end: for a notebook."""
    _listener.set(listener)


def say(line: str) -> None:
    """One line on standard error."""
    listener = _listener.get()
    if listener is not None:
        listener(line, 0, 0)
    else:
        print(line, file=sys.stderr, flush=True)


say_once = cache(say)  # of a model, which may be opened several times


@contextmanager
def progress_bar(description: str, total: int, *, show: bool | None = None) -> Generator[Advance, None, None]:
    """Yield `advance(amount)`. `show=None` draws the bar where standard error is a terminal, or tells a listener."""
    listener = _listener.get()
    if show is None and listener is not None:
        yield _advance(listener, description, total)
    elif not (sys.stderr.isatty() if show is None else show):
        yield lambda amount, note="": None
    else:
        from rich import progress as rich
        from rich.console import Console

        columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
        with rich.Progress(*columns, "left", rich.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield _advance(lambda text, done, _: bar.update(task, completed=done, description=text), description, total)


def _advance(listener: Listener, description: str, total: int) -> Advance:
    done = 0
    listener(description, done, total)

    def advance(amount: int, note: str = "") -> None:
        nonlocal done
        done += amount
        listener(f"{description} {note}".rstrip(), done, total)

    return advance
