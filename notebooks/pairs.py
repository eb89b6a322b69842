"""The pairs: a .py file that people edit, and the .ipynb with the same cells and their outputs."""

import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, short_hardware
from benchmarks.files import write_atomically
from common.errors import require, unknown

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
MINE = FOLDER / "mine"  # The reader's copies. Git ignores it.
EXECUTED = ROOT / "reports/local/notebooks"  # where executed copies go
_IMPORTS = 'import os, sys; sys.path.insert(0, os.path.abspath("{}"))  # imports are from this repository\n'
_NOTEBOOK = re.compile(r"(\d\d|m\d|long)_\w+")


def names() -> list[str]:
    """All notebooks in the order of reading: `00_overview`, `m0_baseline`, ..., `97_scale` and those behind it."""
    found = [path.stem for path in FOLDER.glob("*.py") if _NOTEBOOK.fullmatch(path.stem)]
    return sorted(found, key=lambda name: (name.startswith(("97", "99", "long")), name))


def find(name: str) -> str:
    """The notebook of that name, or whose name begins with it: `m1` is `m1_kv_cache`."""
    for known in names():
        if name in (known, known.split("_")[0]):
            return known
    raise unknown("notebook", name, names())


def source_path(name: str) -> Path:
    return FOLDER / f"{name}.py"


def notebook_path(name: str, folder: Path | None = None) -> Path:
    return (folder or FOLDER) / f"{name}.ipynb"


def require_packages(extra: str, *packages: str) -> None:
    """`UserError` unless all of them are installed."""
    for package in packages:
        require(
            find_spec(package) is not None, f"this needs {package}, which is not installed: pip install '.[{extra}]'"
        )


def read_source(name: str, folder: Path | None = None) -> Any:
    """The cells of the .py file, as a notebook without outputs. The same file always gives the same ids.

    folder: of a copy, where it will lie: its links lead to the same files, and its first code cell finds this
    repository's modules, whatever Python has installed.
    """
    import jupytext

    notebook = jupytext.read(source_path(name), fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if folder not in (None, FOLDER):
            root = Path(os.path.relpath(ROOT, folder)).as_posix()
            cell.source = cell.source.replace("](../", f"]({root}/")
            if "setup" in cell.metadata.get("tags", []):
                cell.source = _IMPORTS.format(root) + cell.source
    return notebook


def write_notebook(name: str, notebook: Any, folder: Path | None = None) -> None:
    """Atomically: a failure leaves the old file."""
    import nbformat

    write_atomically(notebook_path(name, folder), lambda partial: nbformat.write(notebook, partial))


def write_times(seconds: Mapping[str, float]) -> None:
    """Into the table of notebooks/README.md: the minutes of each notebook, rounded up, and this machine."""
    marks = {f"run:{name}": f"{math.ceil(time / 60)} min" for name, time in seconds.items()}
    marks["machine"] = short_hardware(environment(), "cpu")
    text = (path := FOLDER / "README.md").read_text(encoding="utf-8")
    for mark, value in marks.items():
        text = re.sub(f"(<!--{mark}-->).*?<!--/-->", lambda found, value=value: f"{found[1]}{value}<!--/-->", text)
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def line_of(name: str, cell: Any) -> int:
    """The line of the .py file where a code cell begins."""
    text = source_path(name).read_text(encoding="utf-8")
    [source] = [one.source for one in read_source(name).cells if one.id == cell.id]
    return text[: max(0, text.find(source))].count("\n") + 1
