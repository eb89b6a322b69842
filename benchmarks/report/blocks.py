"""What a report is made of: Markdown, and pictures, whose links depend on where the report will lie."""

import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
TEXTS: dict[str, str] = tomllib.loads((TEMPLATES / "texts.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Picture:
    path: Path
    alt: str


Block = str | Picture


def to_markdown(blocks: Iterable[Block], folder: Path) -> str:
    """`folder`: where the file will lie; pictures are linked from there."""

    def one(block: Block) -> str:
        if isinstance(block, str):
            return block
        return f"![{block.alt}]({os.path.relpath(block.path, folder).replace(os.sep, '/')})"

    return "\n\n".join(map(one, blocks)) + "\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, caption: str = "") -> str:
    """The first `words` columns hold words, the others figures. Cells may hold `code`, *emphasis*, **weight**, and
    ends of lines, which a table for the terminal needs."""

    def line(cells: Sequence[str]) -> str:
        lines = (" ".join(cell.replace("-\n", "-").split()) for cell in cells)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in lines) + " |"

    sides = ["---"] * words + ["---:"] * (len(headers) - words)
    return (f"{caption}\n\n" if caption else "") + "\n".join(map(line, (headers, sides, *rows)))


def folded(title: str, blocks: Sequence[str]) -> str:
    """Closed until the reader opens it."""
    inner = "\n\n".join(blocks)
    return f"<details><summary>{title}</summary>\n\n{inner}\n\n</details>"
