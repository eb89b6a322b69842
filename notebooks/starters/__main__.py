"""`python -m notebooks.starters [STAGE]...`: write the starters of stages, check them; without stages, list them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

import stages
from common.cli import run_app
from common.errors import UserError, unknown
from common.watch.progress import progress_bar
from notebooks.starters.check import Verdict, judge, tests_of
from notebooks.starters.tasks import ROOT, Task, tasks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
MARKS = {"holds": ("✓", "green"), "fails": ("✗", "bold red"), "unwritten": ("·", "yellow"), "not run": ("·", "dim")}


@app.command()
def main(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="m3; none: list them.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this one of the stage's tasks.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; what was there is kept as .bak.")] = False,
) -> None:
    """Write the starters of stages into notebooks/mine, or check what became of them."""
    folders = [stages.resolve(name) for name in chosen or ()]
    todo = [one for one in tasks() if one.stage in folders and task in (None, one.name)]
    if folders and not todo:
        raise unknown("task", task, [one.name for one in tasks() if one.stage in folders])
    if not folders:
        overview()
    elif any([one.write(fresh) for one in todo]):
        begin(todo)
    else:
        started = [one for one in todo if one.state() != "not started"]
        if not started:
            begin(todo)
        for one in started:
            check(one)


def overview() -> None:
    say("Build it yourself: the body of an idea is yours to write, the stage's tests check it.\n", "bold")
    for one in tasks():
        state = one.state()
        say(f"  {_make(one):32} {one.minutes:3} min  {state:12} {one.title}", "green" if state == "right" else "")
        if one.asked:
            say(f"{'':56}asked as: {one.asked}", "dim")


def begin(todo: list[Task]) -> None:
    """What to do next: the files to edit, the section that explains them, the command that checks."""
    for one in todo:
        say(f"{one.short}, {one.name}: {one.title} (about {one.minutes} minutes)", "bold")
        for blank in one.blanks:
            say(f"  write  {_at(one, blank.file)}, `{blank.function}`: {blank.todo}")
    say(f"\nThe idea is explained in stages/{todo[0].stage}/README.md, under `The idea`.")
    say(f"Then check it: `{_make(todo[0]) if len(todo) == 1 else _make(todo[0]).partition(' TASK')[0]}`")


def check(one: Task) -> None:
    say(f"{one.short}, {one.name}: {one.title}", "bold")
    with progress_bar(f"{one.short}, {one.name}", len(tests_of(one))) as advance:
        verdict = judge(one, advance=advance)
    show(one, verdict)
    if verdict.right:
        one.remember()
        say("Right. Now an engine runs on your code:\n", "bold green")
        demonstrate(one)
        for lesson in one.lessons:
            say(f"Compare: diff {_at(one, str(lesson))} {lesson}")
        say(f"What the stage changed in all: `make stage{one.short[1:]} diff`. Other tasks: `make build`.\n")


def show(one: Task, verdict: Verdict) -> None:
    """Which behaviours hold; of the first one that does not, what was tried, what came out, and a hint."""
    if verdict.problem:
        say(f"  {verdict.problem}".replace("\n", "\n  "), "red")
    for name in verdict.unwritten:
        todo = next(blank.todo for blank in one.blanks if blank.function == name)
        say(f"  not yet written: `{name}`: {todo}", "yellow")
    for result in verdict.results if not verdict.problem else ():
        mark, style = MARKS[result.status]
        say(f"  {mark} {result.check.says}", style)
        if result is verdict.failure:
            explain(result.check.hint, result.failure)
    if not verdict.right:
        say(f"Change it, then `{_make(one)}` again.\n")


def explain(hint: str, failure: dict[str, Any]) -> None:
    test = failure["test"].partition("::")[2]
    message = "\n".join(failure["message"].splitlines()[:4])
    lines = {"tried": failure["tried"] or f"the stage's own test `{test}`", "came out": failure["got"] or message}
    lines |= {"expected": failure["wanted"], "at": failure["where"], "printed": failure["printed"][-600:], "hint": hint}
    for name, text in lines.items():
        if text:
            say(f"      {name:9} " + text.strip().replace("\n", f"\n{'':16}"), "bold" if name == "hint" else "")


def demonstrate(one: Task) -> None:
    """The task's program, with the learner's files of this task and those of the stage that are right, too."""
    own = [other for other in tasks() if other.stage == one.stage and other.state() == "right"]
    modules = {name: path for other in own for name, path in other.modules().items()}
    program, arguments = f"stages.{one.stage}", list(one.demo)
    if arguments[0].startswith("notebooks."):
        program, *arguments = arguments
    job = json.dumps({"modules": modules, "program": program, "arguments": arguments})
    if subprocess.run([sys.executable, "-m", "notebooks.starters.worker", job], cwd=ROOT).returncode:
        raise UserError("the engine did not run to its end on your code, though the tests hold: see above")


def say(text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False)


def _make(one: Task) -> str:
    several = sum(other.stage == one.stage for other in tasks()) > 1
    return f"make stage{one.short[1:]} build" + (f" TASK={one.name}" if several else "")


def _at(one: Task, lesson: str) -> str:
    return os.path.relpath(next(one.mine(path) for path in one.lessons if str(path) == lesson))


if __name__ == "__main__":
    run_app(app)
