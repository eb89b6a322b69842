"""Execute a notebook from its .py file in a kernel of its own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError
from notebooks import pairs
from notebooks.progress import MARK

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class CellFailedError(UserError):
    """traceback: of the cell, as plain text."""

    traceback = ""


def execute(
    name: str, folder: Path | None = None, advance: Callable[[int, str], None] = lambda cells, begins: None
) -> Any:
    """The notebook with the outputs of all its cells; `CellFailedError` names the cell that failed.

    folder: where it will lie and is executed; None: among the kept ones. A cell may take as long as it takes.
    advance: called with 0 and the first line of each code cell when it begins, and with 1 when it has ended.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    folder = folder or pairs.FOLDER
    notebook = pairs.read_source(name, folder)
    here: list[Any] = []

    def started(cell: Any, cell_index: int) -> None:
        here[:] = [cell]
        if cell.cell_type == "code":
            advance(0, cell.source.strip().splitlines()[0][:40])

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=40"],
        coalesce_streams=True,
        on_cell_execute=started,
        on_cell_executed=lambda cell, cell_index, execute_reply: advance(1, ""),
    )
    path = os.pathsep.join(filter(None, (str(pairs.ROOT), os.environ.get("PYTHONPATH"))))
    try:
        client.execute(env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"})
    except (CellExecutionError, DeadKernelError) as error:
        raise _failure(name, here[0] if here else None, error) from None
    except AssertionError:
        if client.km is None:  # nbclient handled Ctrl-C and shut the kernel down
            raise KeyboardInterrupt from None
        raise
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("metadata") != MARK]
    return notebook


def _failure(name: str, cell: Any, error: Exception) -> CellFailedError:
    where, first = f"notebooks/{name}.py", ""
    if cell is not None:
        where += f":{pairs.line_of(name, cell)}"
        first = f" `{cell.source.strip().splitlines()[0]}`"
    kind, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    reason = f"{kind}: {_first_line(value)}" if kind else _first_line(str(error))
    failure = CellFailedError(f"{where}: the cell{first} failed with {reason}. Nothing was written")
    failure.traceback = _COLOURS.sub("", getattr(error, "traceback", "") or "")
    return failure


def _first_line(text: str) -> str:
    lines = _COLOURS.sub("", text).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"


def show_failure(failure: CellFailedError) -> None:
    """Print the end of the cell's traceback."""
    if failure.traceback:
        print("\n".join(failure.traceback.strip().splitlines()[-25:]), file=sys.stderr)
