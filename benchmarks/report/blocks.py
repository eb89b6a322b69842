"""What a report is made of, and how it is written as Markdown. Text may hold `code`, *emphasis* and **weight**."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table as RichTable
from rich.text import Text as RichText


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """The first `words` columns hold words, the others figures."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    path: Path
    alt: str


@dataclass(frozen=True)
class Folded:
    """Closed until the reader opens it."""

    title: str
    blocks: list[Block] = field(default_factory=list["Block"])


Block = Heading | Paragraph | Table | Picture | Folded


def from_rich(table: RichTable) -> Table:
    """A table that was made for the terminal."""

    def plain(cell: object) -> str:
        text = RichText.from_markup(cell).plain if isinstance(cell, str) else str(cell)
        return " ".join(text.replace("-\n", "-").split())

    columns = [[plain(cell) for cell in column.cells] for column in table.columns]
    return Table([plain(column.header) for column in table.columns], list(zip(*columns, strict=True)))


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """`folder`: where the file will lie; pictures are linked from there."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table():
            return _table(block)
        case Picture(path, alt):
            return f"![{alt}]({os.path.relpath(path, folder).replace(os.sep, '/')})"
        case Folded(title, inner):
            return f"<details><summary>{title}</summary>\n\n{to_markdown(inner, folder)}\n</details>"


def _table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    sides = ["---"] * table.words + ["---:"] * (len(table.headers) - table.words)
    lines = [line(table.headers), line(sides), *map(line, table.rows)]
    return (f"{table.caption}\n\n" if table.caption else "") + "\n".join(lines)
