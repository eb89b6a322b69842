"""What the benchmarks that race no stages share: a file of measurements, and a table of them for the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.environment import environment
from benchmarks.files import write_json


def write_sheet(
    path: Path, schema: str, config: dict[str, Any], records: Sequence[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """Write what was measured, on which machine and with which settings; returns the file's values."""
    values = {"schema": schema, "environment": environment(), "config": config, **more, "records": records}
    write_json(path, values)
    return values


def print_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, caption: str = ""
) -> None:
    """The first `words` columns hold words, the others figures."""
    columns = [Column(name, justify="left" if i < words else "right") for i, name in enumerate(headings)]
    table = Table(*columns, title=title, caption=caption or None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
