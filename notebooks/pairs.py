"""The pairs: a .py file that people edit, and the .ipynb with the same cells and their outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.files import write_atomically
from common.errors import unknown

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_NOTEBOOK = re.compile(r"(\d\d|m\d|long)_\w+")


def names() -> list[str]:
    """All notebooks in the order of reading: `00_overview`, `m0_baseline`, ..., `99_compare`, `long_context`."""
    found = [path.stem for path in FOLDER.glob("*.py") if _NOTEBOOK.fullmatch(path.stem)]
    return sorted(found, key=lambda name: (name.startswith(("99", "long")), name))


def find(name: str) -> str:
    """The notebook of that name, or whose name begins with it: `m1` is `m1_kv_cache`."""
    for known in names():
        if name in (known, known.split("_")[0]):
            return known
    raise unknown("notebook", name, names())


def source_path(name: str) -> Path:
    return FOLDER / f"{name}.py"


def notebook_path(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


def read_source(name: str) -> Any:
    """The cells of the .py file, as a notebook without outputs. The same file always gives the same ids."""
    import jupytext

    notebook = jupytext.read(source_path(name), fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def read_notebook(name: str) -> Any:
    import nbformat

    return nbformat.read(notebook_path(name), as_version=4)


def write_notebook(name: str, notebook: Any) -> None:
    """Atomically: a failure leaves the old file."""
    import nbformat

    write_atomically(notebook_path(name), lambda partial: nbformat.write(notebook, partial))


def line_of(name: str, cell: Any) -> int:
    """The line of the .py file where a code cell begins."""
    text = source_path(name).read_text(encoding="utf-8")
    return text[: max(0, text.find(cell.source))].count("\n") + 1
