"""Blocks as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.blocks import Block, Folded, Heading, Paragraph, Picture, Table


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """`folder`: where the file will lie; pictures are linked from there."""
    return "\n\n".join(_block(block, folder) for block in blocks) + "\n"


def _block(block: Block, folder: Path) -> str:
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
