"""Execute a notebook from its .py file in a kernel of its own."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError
from notebooks import pairs
from notebooks.progress import MARK

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class CellFailedError(UserError):
    """traceback: the end of the cell's, as plain text."""

    traceback = ""


def execute(
    name: str, folder: Path | None = None, advance: Callable[[int, str], None] = lambda cells, what: None
) -> Any:
    """The notebook with the outputs of all its cells; `CellFailedError` names the cell that failed.

    folder: where it will lie and is executed; None: among the kept ones. A cell may take as long as it takes.
    advance: called with 0 and what a cell says about its progress, and with 1 after each code cell.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    class Client(NotebookClient):
        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            if msg["content"].get("metadata") != MARK:
                return super().process_message(msg, cell, cell_index)
            return advance(0, msg["content"]["data"]["text/plain"])

    folder = folder or pairs.FOLDER
    notebook = pairs.read_source(name, folder)
    here = notebook.cells[:1]
    client = Client(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=40"],
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: here.append(cell),
        on_cell_executed=lambda cell, cell_index, execute_reply: advance(1, ""),
    )
    path = os.pathsep.join(filter(None, (str(pairs.ROOT), os.environ.get("PYTHONPATH"))))
    try:
        client.execute(env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"})
    except (CellExecutionError, DeadKernelError) as error:
        raise _failure(name, here[-1], error) from None
    except AssertionError:
        if client.km is None:  # nbclient handled Ctrl-C and shut the kernel down
            raise KeyboardInterrupt from None
        raise
    return notebook


def _failure(name: str, cell: Any, error: Any) -> CellFailedError:
    kind = getattr(error, "ename", "")
    said = f"{kind}: {error.evalue}" if kind else str(error) or "no message"
    reason = _COLOURS.sub("", said).strip().splitlines()[0].rstrip(".")
    where = f"notebooks/{name}.py:{pairs.line_of(name, cell)}: the cell `{cell.source.strip().splitlines()[0]}`"
    failure = CellFailedError(f"{where} failed with {reason}. Nothing was written")
    failure.traceback = "\n".join(_COLOURS.sub("", getattr(error, "traceback", "") or "").strip().splitlines()[-25:])
    return failure
