"""`diff`: what a stage rewrote, against what it replaced."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.style import Style

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@dataclass(frozen=True)
class Change:
    """A module of a stage, and the one of the latest earlier stage of that name, which it replaces (None: new)."""

    path: Path
    replaces: Path | None


def changes(folder: Path) -> list[Change]:
    """The modules that a stage holds itself, those of its folders too; what it takes from others is not among them.

    In order of their paths. An `__init__.py` counts where it holds more than its docstring.
    """
    earlier = sorted((f for f in folder.parent.glob("m[0-9]_*") if f.name < folder.name), reverse=True)
    found: list[Change] = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        trivial = path.name == "__init__.py" and len(path.read_text(encoding="utf-8").splitlines()) < 2
        if path.name != "__main__.py" and not trivial:
            found.append(Change(path, next((f / name for f in earlier if (f / name).exists()), None)))
    return found


def unchanged(folder: Path) -> list[str]:
    """The modules of earlier stages that the stage's engine imports as they are: `['stages/m0_baseline/batch.py']`."""
    found = re.findall(r"from stages\.(m\d_\w+)\.(\w+) import", (folder / "engine.py").read_text(encoding="utf-8"))
    return [f"stages/{stage}/{module}.py" for stage, module in found if stage != folder.name]


def diff_lines(change: Change, root: Path) -> Iterator[str]:
    """The lines of a unified diff; a new file, which has nothing to be held against, is its name and its length."""
    new = change.path.read_text(encoding="utf-8").splitlines()
    if change.replaces is None:
        yield f"new: {change.path.relative_to(root)} ({len(new)} lines)"
        return
    old = change.replaces.read_text(encoding="utf-8").splitlines()
    names = (str(change.replaces.relative_to(root)), str(change.path.relative_to(root)))
    yield from difflib.unified_diff(old, new, *names, lineterm="")


def show_diff(folder: Path) -> None:
    """Print the differences, coloured in a terminal; then what the stage uses unchanged."""
    root = folder.parent.parent
    lines = [line for change in changes(folder) for line in (*diff_lines(change, root), "")]
    lines.append(f"used unchanged: {', '.join(unchanged(folder)) or 'nothing of an earlier stage'}")
    coloured = sys.stdout.isatty()
    try:
        for line in lines:
            print(_colour(line) if coloured else line)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _colour(line: str) -> str:
    style = "bold" if line.startswith(("---", "+++", "new:")) else COLOURS.get(line[:1], "none")
    return Style.parse(style).render(line)
