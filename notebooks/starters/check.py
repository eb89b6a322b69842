"""Judges a learner's files: first by reading them, then by running the task's tests on them in another process."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from notebooks.starters.blank import functions, names, unwritten
from notebooks.starters.tasks import ROOT, Check, Task

LIMIT = 60.0
"""Seconds for one test; all take less than a few on an idle machine."""


@dataclass
class Result:
    """Of a behaviour. status: holds, fails, unwritten (it met a function that is not written) or not run."""

    check: Check
    status: str = "not run"
    failure: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class Verdict:
    """problem: why nothing could be run, in one or two lines; else the result of each behaviour."""

    results: list[Result] = field(default_factory=list[Result])
    problem: str = ""
    unwritten: list[str] = field(default_factory=list[str])

    @property
    def right(self) -> bool:
        return bool(self.results) and all(result.status == "holds" for result in self.results)

    @property
    def failure(self) -> Result | None:
        """The first behaviour that does not hold, though all is written that it needs."""
        return next((result for result in self.results if result.status == "fails"), None)


def read(task: Task, verdict: Verdict) -> bool:
    """Look at the files without running them; False: there is no use in running them."""
    blanked = {blank.function for blank in task.blanks}
    for lesson in task.lessons:
        mine = task.mine(lesson)
        at = os.path.relpath(mine, ROOT)
        try:
            tree = ast.parse(mine.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            line = f":{error.lineno}: {(error.text or '').strip()}" if isinstance(error, SyntaxError) else ""
            verdict.problem = f"{at}{line}\nThis is no Python yet: {getattr(error, 'msg', error)}."
            return False
        lesson_tree = ast.parse((ROOT / lesson).read_text(encoding="utf-8"))
        own, given = functions(tree), functions(lesson_tree)
        for name in [name for name in (*names(lesson_tree), *given) if name not in (*names(tree), *own)]:
            verdict.problem = f"{at}: `{name}` is gone, and the engine needs it. FRESH=1 writes the starter anew."
            return False
        for name, function in given.items():
            wanted, found = _parameters(function), _parameters(own[name])
            if found != wanted:
                line = f"{at}:{own[name].lineno}: `{name}`"
                verdict.problem = f"{line} takes ({', '.join(found)}).\nThe engine calls it with ({', '.join(wanted)})."
                return False
        verdict.unwritten += [name for name in unwritten(tree) if name in blanked]
    return len(verdict.unwritten) < len(blanked)


def judge(task: Task, limit: float = LIMIT, advance: Callable[[int], object] = lambda count: None) -> Verdict:
    """Read, then run. `advance` is called with 1 for each test that ended."""
    verdict = Verdict([Result(check) for check in task.checks])
    if read(task, verdict):
        job = {"modules": task.modules(), "tests": tests_of(task), "only": task.only, "limit": limit}
        command = [sys.executable, "-m", "notebooks.starters.worker", json.dumps(job)]
        with subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            follow(process.stdout, verdict, task, limit, advance)
    return verdict


def follow(lines: Iterable[str], verdict: Verdict, task: Task, limit: float, advance: Callable[[int], object]) -> None:
    """Take what the worker writes into the verdict."""
    files, current, collected, done = list(task.modules().values()), "", list[str](), set[str]()
    for line in lines:
        if not line.startswith("{"):  # the worker ended itself, and says where it was
            at = re.match(r'\s*File "(.*)", line (\d+) in (\w+)', line)
            if at and at[1] in files and not verdict.problem:
                place = f"{os.path.relpath(at[1], ROOT)}:{at[2]}, in `{at[3]}`"
                verdict.problem = f"Not done after {limit:.0f} s: an endless loop? It was at {place}."
            continue
        event = json.loads(line)
        match event["event"]:
            case "broken":
                verdict.problem = f"The file cannot be imported: {event['message']}\n{event['where']}"
            case "collected":
                collected = event["tests"]
            case "begin":
                current = event["test"]
            case "failed":
                result = next(result for result in verdict.results if _covers(result.check, event["test"]))
                if result.status != "fails":
                    result.status, result.failure = ("unwritten" if event["unwritten"] else "fails"), event
            case _:
                done.add(event["test"])
                advance(1)
    for result in verdict.results:
        tests = {test for test in collected if _covers(result.check, test)}
        if result.status == "not run" and tests and tests <= done:
            result.status = "holds"
    if not collected:
        verdict.problem = verdict.problem or "The tests did not start: `make setup` installs what they need."
    elif current not in done:
        name = current.partition("::")[2]
        verdict.problem = verdict.problem or f"Not done with `{name}`: too slow, or your code ends the process."


def tests_of(task: Task) -> list[str]:
    return [test for check in task.checks for test in check.tests]


def _covers(check: Check, test: str) -> bool:
    """Is this one of the behaviour's tests? It may name a file, a class, or a function with parameters."""
    return any(test == own or test.startswith((f"{own}[", f"{own}::")) for own in check.tests)


def _parameters(function: Any) -> list[str]:
    a = function.args
    return [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if argument]


def _environment() -> dict[str, str]:
    """One thread: tiny models are faster so. Nothing of the process that asks, which may be pytest itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FOLOVLLM_"))}
    return kept | {"OMP_NUM_THREADS": "1"}
