"""What a report is made of, before it is HTML or Markdown. Text may hold `code`, *emphasis* and **weight**."""

from __future__ import annotations

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
    """Closed until somebody opens it."""

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
