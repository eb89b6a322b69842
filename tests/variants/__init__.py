"""Model folders and GGUF files as people have them: each variant can be made, loaded and run.

`python -m tests.variants FOLDER [NAME ...]` makes them (or those whose name begins so), lets m6 generate from each, and
prints the status, the seconds and what it said. Each module of this package adds its own to `VARIANTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Make = Callable[[Path], Path]
"""Writes a model below a folder that exists and is empty; returns what `--model` takes."""


@dataclass(frozen=True)
class Variant:
    """refused: regular expression of the one line that says why it is not loaded; None: it generates."""

    make: Make
    refused: str | None = None
    options: tuple[str, ...] = ()  # more for the command line


VARIANTS: dict[str, Variant] = {}


def variant(name: str, refused: str | None = None, options: tuple[str, ...] = ()) -> Callable[[Make], Make]:
    """Decorator: adds a maker to `VARIANTS`, as `area: what is special about it`."""

    def add(make: Make) -> Make:
        assert name not in VARIANTS, name
        VARIANTS[name] = Variant(make, refused, options)
        return make

    return add
