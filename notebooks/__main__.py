"""`python -m notebooks [NAME]...`: execute copies of notebooks, or open the reader's; without names, all of them."""

import sys
import time
from typing import Annotated

import typer

from common.cli import run_app
from common.watch.progress import progress_bar
from notebooks import pairs
from notebooks.copies import open_lab
from notebooks.execute import CellFailedError, execute

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
    folder = pairs.FOLDER if keep else pairs.EXECUTED
    folder.mkdir(parents=True, exist_ok=True)
    cells = sum(cell.cell_type == "code" for name in todo for cell in pairs.read_source(name).cells)
    failures: list[CellFailedError] = []
    times: dict[str, float] = {}
    with progress_bar("notebooks", cells) as advance:
        for name in todo:
            started = time.perf_counter()
            try:
                notebook = execute(name, folder, lambda cells, what, name=name: advance(cells, f"{name} {what}"))
            except CellFailedError as failure:
                failures.append(failure)
                continue
            pairs.write_notebook(name, notebook, folder)
            times[name] = time.perf_counter() - started
            print(f"{name:24} {times[name]:5.0f} s", flush=True)
    print(f"executed notebooks are in {folder.relative_to(pairs.ROOT)}")
    if keep:
        pairs.write_times(times)
    for failure in failures:
        print(failure.traceback, f"error: {failure}", sep="\n", file=sys.stderr)
    if failures:
        raise typer.Exit(2)


if __name__ == "__main__":
    run_app(app)
