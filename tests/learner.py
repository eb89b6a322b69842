"""In a process of its own: the project, with a learner's modules in the place of a lesson's. Tests, or a program.

`python -m tests.learner JOB`, a JSON object: `notebooks/starters` starts it. What happens is written to standard
output, a JSON object a line; after too long a test, the place at which it hangs. The limit is CPU time, so that a busy
machine makes no difference; a test that waits and does not compute has `WAITING` times as long. This file imports
nothing of the project before the learner's modules are in place.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.abc
import importlib.util
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Emit = Callable[..., object]
WAITING = 10


class Learner(importlib.abc.MetaPathFinder):
    """Finds a learner's file for the names of the modules that it stands for."""

    def __init__(self, modules: dict[str, str]) -> None:
        self.modules = modules

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        mine = self.modules.get(fullname)
        return None if mine is None else importlib.util.spec_from_file_location(fullname, mine)


class Reporter:
    """Pytest's hooks: tells of each test, and stops where a step failed: the stage's own tests come after them."""

    def __init__(self, emit: Emit, job: dict[str, Any], guard: Callable[[], object]) -> None:
        self.emit, self.guard = emit, guard
        self.files: list[str] = list(job["modules"].values())
        self.only: dict[str, Any] = job["only"]
        self.stop_first: bool = job.get("stop_first", False)
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out what is for other stages, or other implementations."""
        parameters = [(item, getattr(item, "callspec", None)) for item in items]
        items[:] = [
            item for item, spec in parameters if spec is None or self.only.items() <= (self.only | spec.params).items()
        ]

    def pytest_collection_finish(self, session: Any) -> None:
        self.emit(event="collected", tests=[item.nodeid for item in session.items])

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool | None:
        if self.failed and (self.stop_first or "test_steps" not in item.nodeid):
            return True  # not run at all
        self.emit(event="begin", test=item.nodeid)
        self.guard()
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[Any]:
        report = yield
        if call.excinfo is not None:
            self.failed = True
            printed = "".join(text for _, name, text in item._report_sections if name == "stdout")
            self.emit(event="failed", test=item.nodeid, printed=printed, **describe(call.excinfo.value, self.files))
        elif call.when == "teardown" and report.passed:
            self.emit(event="end", test=item.nodeid)
        return report


def describe(error: BaseException, files: list[str]) -> dict[str, Any]:
    """An exception, for a learner: what was tried, came out and was expected (`tests.steps`), or its message; and the
    last line of the learner's files on its way."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f"{os.path.relpath(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    told = {name: getattr(error, name, "") for name in ("tried", "got", "wanted")}
    return told | {"message": message, "where": where, "unwritten": isinstance(error, NotImplementedError)}


def run(job: dict[str, Any], out: Any) -> None:
    """Load the learner's modules and run the job's tests."""

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=out, flush=True)

    def guard(times: int = 1) -> None:
        seconds = times * job["limit"]
        faulthandler.dump_traceback_later(WAITING * seconds, exit=True, file=out)
        signal.setitimer(signal.ITIMER_PROF, seconds)

    faulthandler.register(signal.SIGPROF, file=out, chain=True)  # then what the signal does by itself: it ends all
    guard(5)  # imports take long
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # these tests need none, and some take seconds to import
    sys.meta_path.insert(0, Learner(job["modules"]))
    try:
        for name in job["modules"]:
            importlib.import_module(name)
    except (Exception, SystemExit) as error:
        emit(event="broken", **describe(error, list(job["modules"].values())))
        return
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=0"]
    pytest.main([*options, *job["tests"]], plugins=[Reporter(emit, job, guard)])
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    job = json.loads(sys.argv[1])
    if "program" in job:
        sys.meta_path.insert(0, Learner(job["modules"]))
        sys.argv = list(job["program"])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    with os.fdopen(os.dup(1), "w") as out:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        run(job, out)


if __name__ == "__main__":
    main()
