"""Runs the tests of one mutant in a process that starts with the libraries loaded: a fork takes no time, torch does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.mutants.choose import Choice

LIMIT = 240.0
"""Seconds for one mutant, after which it counts as a survivor."""
NO_TEST = "no test ran"
SKIPPED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "build", "*.egg-info", ".coverage*", "h100")


@dataclass(frozen=True)
class Outcome:
    choice: Choice
    caught_by: str | None
    """The first test that failed; None: a survivor."""
    seconds: float
    note: str = ""


def check_unchanged(root: Path, scratch: Path, choices: Sequence[Choice], jobs: int) -> str | None:
    """Run the tests of all choices without a fault, file by file: what fails already, or does not run."""
    files: dict[str, set[str]] = {}
    for test in {test for choice in choices for test in choice.tests}:
        files.setdefault(test.partition("::")[0], set()).add(test)
    if not files:
        return None
    path = choices[0].mutant.path
    same = replace(choices[0].mutant, source=path.read_text(encoding="utf-8"))
    outcomes: list[Outcome] = []
    run_all(root, scratch, [Choice("", same, tuple(sorted(tests))) for tests in files.values()], jobs, outcomes.append)
    for outcome in outcomes:
        if outcome.caught_by or outcome.note.startswith(NO_TEST):
            return outcome.caught_by or f"{outcome.choice.tests[0]}: {outcome.note}"
    return None


def run_all(root: Path, scratch: Path, choices: Sequence[Choice], jobs: int, tell: Callable[[Outcome], None]) -> None:
    """Run every mutant's tests, `jobs` at a time, each in a copy of the tree."""
    _load_libraries()
    context = multiprocessing.get_context("fork")
    todo = list(choices)
    free = [scratch / f"tree{job}" for job in range(jobs)]
    for tree in free:
        shutil.copytree(root, tree, ignore=SKIPPED)
    active: list[tuple[Any, Connection, Choice, Path, float]] = []
    while todo or active:
        while todo and free:
            choice, tree = todo.pop(0), free.pop()
            name = choice.mutant.path.relative_to(root)
            (tree / name).write_text(choice.mutant.source, encoding="utf-8")
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(tree, choice.tests, theirs))
            process.start()
            theirs.close()
            active.append((process, ours, choice, tree, time.perf_counter()))
        time.sleep(0.05)
        for one in list(active):
            process, ours, choice, tree, began = one
            late = time.perf_counter() - began > LIMIT
            if process.is_alive() and not late:
                continue
            if late:
                _end(process)
            failed, note = ours.recv() if ours.poll() else (None, "")
            if late:
                note = f"stopped after {LIMIT:.0f} s"
            elif process.exitcode and failed is None:
                failed = f"the process ended with status {process.exitcode}"
            process.join()
            name = choice.mutant.path.relative_to(root)
            shutil.copy(root / name, tree / name)
            active.remove(one)
            free.append(tree)
            tell(Outcome(choice, failed, time.perf_counter() - began, note))


def _end(process: Any) -> None:
    """It and whatever its tests started: it leads a group of its own."""
    os.killpg(process.pid, signal.SIGKILL)


def _load_libraries() -> None:
    """Everything heavy that is not ours. Triton has to know before that it is interpreted."""
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import numba  # noqa: F401
    import pytest  # noqa: F401
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import transformers.models  # noqa: F401


class Select:
    """Of what is collected the tests that were asked for, in that order; remembers the first failure."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}
        self.failed: str | None = None
        self.ran = 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._order), key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = f"collecting {report.nodeid}"


def _child(tree: Path, tests: Sequence[str], answer: Connection) -> None:
    os.setpgid(0, 0)
    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "common", "stages", "benchmarks")]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    out = os.open(tree.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    select = Select(tests)
    files = sorted({test.split("::")[0] for test in tests})
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "--timeout=60", "--no-cov"]
    status = pytest.main([*options, *files], plugins=[select])
    note = "" if select.ran or select.failed else f"{NO_TEST} (pytest's status {int(status)})"
    answer.send((select.failed, note))
    answer.close()
    os._exit(0)
