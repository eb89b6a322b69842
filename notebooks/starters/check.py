"""Judges a learner's files: first by reading them, then by running the task's tests on them in another process."""

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

LIMIT = 60.0  # seconds of CPU time for one test; all take less than a few


@dataclass
class Result:
    """Of a behaviour. status: holds, fails, unwritten (it met a function that is not written) or not run."""

    check: Check
    status: str = "not run"
    failure: dict[str, Any] = field(default_factory=dict[str, Any])

    def covers(self, test: str) -> bool:
        """Is this one of the behaviour's tests? It may name a class, or a function with parameters."""
        return any(test == own or test.startswith((f"{own}[", f"{own}::")) for own in self.check.tests)


@dataclass
class Verdict:
    """problem: why nothing could be run, in one or two lines; otherwise the result of each behaviour."""

    results: list[Result]
    problem: str = ""
    unwritten: list[str] = field(default_factory=list[str])

    @property
    def right(self) -> bool:
        return not self.problem and all(result.status == "holds" for result in self.results)

    @property
    def failure(self) -> Result | None:
        """The first behaviour that does not hold, though all is written that it needs."""
        return next((result for result in self.results if result.status == "fails"), None)


def judge(task: Task, limit: float = LIMIT, advance: Callable[[int], object] = lambda count: None) -> Verdict:
    """Read, then run. `advance` is called with 1 for each test that ended."""
    verdict = Verdict([Result(check) for check in task.checks])
    verdict.problem = read(task, verdict)
    if not verdict.problem and len(verdict.unwritten) < len({blank.function for blank in task.blanks}):
        job = {"modules": task.modules(), "tests": task.tests, "only": task.only, "limit": limit}
        command = [sys.executable, "-m", "tests.learner", json.dumps(job)]
        left_out = ("PYTEST_", "FOLOVLLM_COVERAGE", "FOLOVLLM_DEEP")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        environment["OMP_NUM_THREADS"] = "1"  # tiny models are faster so
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            follow(process.stdout or (), verdict, task, limit, advance)
    return verdict


def read(task: Task, verdict: Verdict) -> str:
    """Look at the files without running them; what keeps them from being run, or nothing."""
    for lesson in task.lessons:
        at = os.path.relpath(task.mine(lesson), ROOT)
        try:
            tree = ast.parse(task.mine(lesson).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8
            line = f":{error.lineno}: {(error.text or '').strip()}" if isinstance(error, SyntaxError) else ""
            return f"{at}{line}\nThis is no Python yet: {getattr(error, 'msg', error)}."
        lesson_tree = ast.parse((ROOT / lesson).read_text(encoding="utf-8"))
        own, given = functions(tree), functions(lesson_tree)
        for name in (*names(lesson_tree), *given):
            if name not in (*names(tree), *own):
                return f"{at}: `{name}` is gone, and the engine needs it. FRESH=1 writes the starter anew."
        for name, function in given.items():
            both = (f.args for f in (own[name], function))
            found, wanted = ([one.arg for one in (*a.posonlyargs, *a.args, *a.kwonlyargs)] for a in both)
            if found != wanted:
                line = f"{at}:{own[name].lineno}: `{name}` takes ({', '.join(found)})."
                return f"{line}\nThe engine calls it with ({', '.join(wanted)})."
        verdict.unwritten += [name for name in unwritten(tree) if name in [blank.function for blank in task.blanks]]
    return ""


def follow(lines: Iterable[str], verdict: Verdict, task: Task, limit: float, advance: Callable[[int], object]) -> None:
    """Take what the other process writes into the verdict."""
    files, current, collected, done = list(task.modules().values()), "", list[str](), set[str]()
    for line in lines:
        if not line.startswith("{"):  # it ended itself after too long a test, and says where it was
            at = re.match(r'\s*File "(.*)", line (\d+) in (\S+)', line)
            if at and at[1] in files and not verdict.problem:
                place = f"{os.path.relpath(at[1], ROOT)}:{at[2]}, in `{at[3]}`"
                verdict.problem = f"Not done after {limit:.0f} s of CPU time: an endless loop? It was at {place}."
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
                result = next(result for result in verdict.results if result.covers(event["test"]))
                if result.status != "fails":
                    result.status, result.failure = ("unwritten" if event["unwritten"] else "fails"), event
            case _:
                done.add(event["test"])
                advance(1)
    for result in verdict.results:
        tests = {test for test in collected if result.covers(test)}
        if result.status == "not run" and tests and tests <= done:
            result.status = "holds"
    if not verdict.problem and not collected:
        verdict.problem = "The tests did not start: your code ends the process, or a package is missing (`make setup`)."
    elif not verdict.problem and current not in done:
        name = current.partition("::")[2]
        verdict.problem = f"Not done with `{name}`: too slow, or your code ends the process."
