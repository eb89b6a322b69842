"""Which lines of the project the tests execute: with `FOLOVLLM_COVERAGE=90` a run fails where it is under 90 per cent.

SlipCover takes its instruments out of a line that has been seen, so a run takes hardly longer; the tracer of
coverage.py slows all of Python (before Python 3.12). Files with kernels for Numba are left out: it compiles
their bytecode, which must stay as it is, and no tracer ever sees it run.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENABLED = "FOLOVLLM_COVERAGE"
SOURCES = [str(ROOT / folder) for folder in ("common", "stages")]
COMPILED = re.compile(r"^@(compiled|njit|intrinsic)\b", re.MULTILINE)
"""In a file that Numba compiles."""
_measured: Any = None
_of_workers: list[dict[str, Any]] = []


def start() -> None:
    """In every process that runs tests, before the project's modules are imported."""
    global _measured
    if ENABLED in os.environ and _measured is None:
        import slipcover

        omitted = [str(path) for source in SOURCES for path in Path(source).rglob("*.py") if _left_out(path)]
        _measured = slipcover.Slipcover(source=SOURCES, omit=omitted)
        slipcover.ImportManager(_measured, slipcover.FileMatcher(SOURCES, omitted)).__enter__()


def _left_out(path: Path) -> bool:
    """Command lines, which run in processes of their own, and what Numba compiles, or runs only while it compiles."""
    return path.name == "__main__.py" or COMPILED.search(path.read_text("utf-8")) is not None


def compile_measured(source: Any, filename: str = "", mode: str = "exec") -> Any:
    """`compile`, for code that is made from our files while it runs: Triton's interpreter rewrites kernels."""
    code = compile(source, filename, mode)
    return _measured.instrument(code) if _measured is not None and filename.startswith(tuple(SOURCES)) else code


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: Any) -> None:
    """A worker sends what it saw; the process that has no workers, or had them, decides."""
    if _measured is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["coverage"] = json.dumps(_measured.get_coverage())
    elif session.exitstatus == 0 and percent() < float(os.environ[ENABLED]):
        session.exitstatus = 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    found = getattr(node, "workeroutput", {}).get("coverage")
    if found:
        _of_workers.append(json.loads(found))


def merged() -> dict[str, Any]:
    import slipcover

    everything = _measured.get_coverage()
    for found in _of_workers:
        slipcover.merge_coverage(everything, found)
    return everything


def percent() -> float:
    return float(merged()["summary"]["percent_covered"])


def lines() -> list[str]:
    """For the end of a run: the total, and the files with lines that no test executes."""
    if _measured is None:
        return []
    found, asked = merged(), float(os.environ[ENABLED])
    rows = [(len(file["missing_lines"]), name) for name, file in found["files"].items() if file["missing_lines"]]
    worst = [
        f"{count:6} lines unseen in {name}" for count, name in sorted(rows, key=lambda row: (-row[0], row[1]))[:10]
    ]
    total = found["summary"]["percent_covered"]
    verdict = "" if total >= asked else f", which is under the {asked:g} % asked: FAILED"
    return [*worst, f"coverage: {total:.1f} % of {_count(found)} lines{verdict}"]


def _count(found: dict[str, Any]) -> int:
    return sum(len(file["executed_lines"]) + len(file["missing_lines"]) for file in found["files"].values())
