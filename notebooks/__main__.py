"""`python -m notebooks [NAME]...`: execute copies of notebooks, or open the reader's; without names, all of them."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from common.cli import run_app
from common.config import DEFAULT_MODEL
from common.watch.progress import progress_bar
from notebooks import pairs
from notebooks.copies import open_lab
from notebooks.execute import CellFailedError, execute, show_failure
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.settings import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="m1 00; none: all.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Rewrite the .ipynb of notebooks/, outputs included.")] = False,
    lab: Annotated[bool, typer.Option("--lab", help="Open your own copy in JupyterLab instead.")] = False,
) -> None:
    """Execute copies of notebooks, and write each into reports/local/notebooks once all of its cells ran."""
    pairs.require_packages("notebooks", "jupytext", "ipykernel", "nbclient")
    todo = list(dict.fromkeys(pairs.find(name) for name in chosen)) if chosen else pairs.names()
    if lab:
        pairs.require_packages("lab", "jupyterlab")
        open_lab(todo[0])
    prepare(todo)
    folder = pairs.FOLDER if keep else pairs.EXECUTED
    folder.mkdir(parents=True, exist_ok=True)
    cells = sum(cell.cell_type == "code" for name in todo for cell in pairs.read_source(name).cells)
    failures: list[CellFailedError] = []
    with progress_bar("notebooks", cells) as advance:
        for name in todo:
            started = time.perf_counter()
            try:
                notebook = execute(name, folder, lambda count, cell, name=name: advance(count, f"{name} {cell}"))
                pairs.write_notebook(name, notebook, folder)
                print(f"{name:24} {time.perf_counter() - started:5.0f} s", flush=True)
            except CellFailedError as failure:
                failures.append(failure)
    print(f"executed copies are in {folder.relative_to(pairs.ROOT)}")
    for failure in failures[:-1]:
        show_failure(failure)
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        show_failure(failures[-1])
        raise failures[-1]


def prepare(todo: list[str]) -> None:
    """Make m7's 4-bit model for notebooks that build m7: the first time it takes minutes, and has a bar of its own."""
    if any('"m7"' in pairs.source_path(name).read_text(encoding="utf-8") for name in todo):
        quantize(DEFAULT_MODEL, Settings())


if __name__ == "__main__":
    run_app(app)
