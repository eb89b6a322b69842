"""`python -m notebooks.starters [STAGE]...`: write the starters of stages, or check them; no stage: list all tasks."""

import json
import os
import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console

import stages
from common.cli import run_app
from common.errors import UserError, require, unknown
from common.watch.progress import progress_bar
from notebooks.starters.check import Result, Verdict, judge
from notebooks.starters.tasks import ROOT, Task, tasks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MARKS = {"holds": ("✓", "green"), "fails": ("✗", "bold red"), "unwritten": ("·", "yellow"), "not run": ("·", "dim")}


def say(text: str, style: str = "") -> None:
    Console(highlight=False, soft_wrap=True).print(text, style=style, markup=False)


@app.command()
def main(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="m3; none: list them.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this one of the stage's tasks.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; what was there is kept as .bak.")] = False,
) -> None:
    """Write the starters of stages into notebooks/mine, or check what became of them."""
    folders = [stages.resolve(name) for name in chosen or ()]
    require(bool(folders) or not fresh, "FRESH=1 needs a stage, whose files begin again: `make stage3 build FRESH=1`")
    known = [one for one in tasks() if one.stage in folders or not folders]
    todo = [one for one in known if task in (None, one.name)]
    if not todo:
        raise unknown("task", task, [one.name for one in known])
    written = bool(folders) and [one.write(fresh) for one in todo]
    started = [one for one in todo if one.state() != "not started"]
    if not folders:
        overview(todo)
    elif not started or (written and any(written)):
        begin(todo)
    else:
        for one in [one for one in started if task or one.state() != "right"] or started:
            check(one)
        for one in [one for one in todo if one not in started]:
            say(f"{one.short}, {one.name}: not started", "dim")


def overview(todo: list[Task]) -> None:
    say("Build it yourself: you write the body of an idea, the stage's tests check it.\n", "bold")
    for one in todo:
        state, asked = one.state(), f' (asked as "{one.asked}")' if one.asked else ""
        line = f"  {command([one]):41} {one.minutes:3} min  {state:12} {one.title}{asked}"
        say(line, "green" if state == "right" else "")


def begin(todo: list[Task]) -> None:
    """What to do next: the files to edit, the section that explains them, the command that checks."""
    for one in todo:
        say(f"{one.short}, {one.name}: {one.title} (about {one.minutes} minutes)", "bold")
        for lesson in one.lessons:
            say(f"  in {os.path.relpath(one.mine(lesson))}", "bold")
            for blank in [blank for blank in one.blanks if blank.file == str(lesson)]:
                say(f"    `{blank.function}`: {blank.todo}")
    sections = dict.fromkeys(f"stages/{one.stage}/README.md, under `{one.section}`" for one in todo)
    say(f"\nIt is explained in {'; '.join(sections)}.")
    say(f"Then check it: `{command(todo)}`")


def check(one: Task) -> None:
    say(f"{one.short}, {one.name}: {one.title}", "bold")
    with progress_bar(f"{one.short}, {one.name}", len(one.tests)) as advance:
        verdict = judge(one, advance=advance)
    show(one, verdict)
    if verdict.right:
        one.remember()
        say("Right. Now an engine runs on your code:\n", "bold green")
        demonstrate(one)
        for lesson in one.lessons:
            say(f"Compare: diff {os.path.relpath(one.mine(lesson))} {lesson}")
        say(f"What the stage changed in all: `make stage{one.short[1:]} diff`. Other tasks: `make build`.\n")
    else:
        say(f"Change it, then `{command([one])}` again.\n")


def show(one: Task, verdict: Verdict) -> None:
    """Which behaviours hold; of the first one that does not, what was tried, what came out, and a hint."""
    for name in verdict.unwritten:
        todo = next(blank.todo for blank in one.blanks if blank.function == name)
        say(f"  not yet written: `{name}`: {todo}", "yellow")
    if verdict.problem:
        say("  " + verdict.problem.replace("\n", "\n  "), "red")
        return
    for result in verdict.results:
        mark, style = MARKS[result.status]
        say(f"  {mark} {result.check.says}", style)
        if result is verdict.failure:
            explain(result)


def explain(result: Result) -> None:
    told = result.failure
    lines = [line for line in told["message"].splitlines() if not line.lstrip().startswith("+")]  # pytest's details
    message = "\n".join(lines[:3]).replace("assert False", "it does not hold")
    file, _, test = told["test"].partition("::")
    tried = told["tried"] or f"the stage's own test `{test}` in {file}"
    parts = {"tried": tried, "came out": told["got"] or message, "expected": told["wanted"], "at": told["where"]}
    for name, text in (parts | {"printed": told["printed"][-600:], "hint": result.check.hint}).items():
        if text:
            say(f"      {name:9} " + text.strip().replace("\n", f"\n{'':16}"), "bold" if name == "hint" else "")


def demonstrate(one: Task) -> None:
    """The task's program, with the learner's files of this task and those of the stage that are right, too."""
    own = [other for other in tasks() if other.stage == one.stage and other.state() == "right"]
    modules = {name: path for other in own for name, path in other.modules().items()}
    program = one.demo if one.demo[0].startswith("notebooks.") else [f"stages.{one.stage}", *one.demo]
    job = json.dumps({"modules": modules, "program": program})
    if subprocess.run([sys.executable, "-m", "tests.learner", job], cwd=ROOT).returncode:
        raise UserError("the engine did not run to its end on your code, though the tests hold: see above")


def command(todo: list[Task]) -> str:
    """What checks these: all tasks of their stages, or one."""
    words = " ".join(dict.fromkeys(f"stage{one.short[1:]}" for one in todo))
    alone = len(todo) > 1 or sum(other.stage == todo[0].stage for other in tasks()) == 1
    return f"make {words} build" + ("" if alone else f" TASK={todo[0].name}")


if __name__ == "__main__":
    run_app(app)
