"""Execute a notebook from its .py file in a kernel of its own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from notebooks import pairs

CELL_TIMEOUT = 300
"""Seconds."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class CellFailedError(UserError):
    """traceback: of the cell, as plain text."""

    traceback = ""


def execute(name: str, advance: Callable[[int], None] = lambda cells: None) -> Any:
    """The notebook with the outputs of all its cells; `CellFailedError` names the cell that failed.

    advance: called with 1 after each code cell.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = pairs.read_source(name)
    here: list[Any] = []

    def started(cell: Any, cell_index: int) -> None:
        here[:] = [cell]

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(pairs.FOLDER)}},
        record_timing=False,
        extra_arguments=["--log-level=40"],
        coalesce_streams=True,
        on_cell_execute=started,
        on_cell_executed=lambda cell, cell_index, execute_reply: advance(1),
    )
    path = os.pathsep.join(filter(None, (str(pairs.ROOT), os.environ.get("PYTHONPATH"))))
    try:
        client.execute(env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise _failure(name, here[0] if here else None, error) from None
    except AssertionError:
        if client.km is None:  # nbclient handled Ctrl-C and shut the kernel down
            raise KeyboardInterrupt from None
        raise
    return notebook


def _failure(name: str, cell: Any, error: Exception) -> CellFailedError:
    where, first = f"notebooks/{name}.py", ""
    if cell is not None:
        where += f":{pairs.line_of(name, cell)}"
        first = f" `{cell.source.strip().splitlines()[0]}`"
    kind, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    reason = f"{kind}: {_first_line(value)}" if kind else _first_line(str(error))
    failure = CellFailedError(f"{where}: the cell{first} failed with {reason}. The .ipynb is as it was")
    failure.traceback = _COLOURS.sub("", getattr(error, "traceback", "") or "")
    return failure


def _first_line(text: str) -> str:
    lines = _COLOURS.sub("", text).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"


def show_failure(failure: CellFailedError) -> None:
    """Print the end of the cell's traceback."""
    if failure.traceback:
        print("\n".join(failure.traceback.strip().splitlines()[-25:]), file=sys.stderr)
