"""`python -m notebooks [NAME]...`: execute notebooks and keep their outputs; without names, all of them."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from common.cli import run_app
from common.config import DEFAULT_MODEL
from common.errors import UserError
from common.watch.progress import progress_bar
from notebooks.execute import CellFailedError, execute, show_failure
from notebooks.pairs import find, names, read_source, source_path, write_notebook
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.settings import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="m1 00; none: all.")] = None,
) -> None:
    """Execute notebooks from their .py files and write each .ipynb once all of its cells ran."""
    try:
        todo = list(dict.fromkeys(find(name) for name in chosen)) if chosen else names()
        cells = sum(cell.cell_type == "code" for name in todo for cell in read_source(name).cells)
        import ipykernel  # noqa: F401  # pyright: ignore[reportUnusedImport]  (the kernel that nbclient starts)
        import nbclient  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise UserError(
            f"the notebooks need {error.name}, which is not installed: pip install '.[notebooks]'"
        ) from None
    prepare(todo)
    failures: list[CellFailedError] = []
    times: list[str] = []
    with progress_bar("notebooks", cells) as advance:
        for name in todo:
            started = time.perf_counter()
            try:
                write_notebook(name, execute(name, lambda count, name=name: advance(count, name)))
                times.append(f"{name:24} {time.perf_counter() - started:5.0f} s")
            except CellFailedError as failure:
                failures.append(failure)
    print("\n".join(times))
    for failure in failures[:-1]:
        show_failure(failure)
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        show_failure(failures[-1])
        raise failures[-1]


def prepare(todo: list[str]) -> None:
    """Make m7's 4-bit model for notebooks that build m7: the first time it takes minutes, too long for a cell."""
    if any('"m7"' in source_path(name).read_text(encoding="utf-8") for name in todo):
        quantize(DEFAULT_MODEL, Settings())


if __name__ == "__main__":
    run_app(app)
