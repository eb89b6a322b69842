"""Build it yourself: starters, what is said to a learner, and the hints that classic mistakes meet."""

from __future__ import annotations

import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.cli import run_app
from notebooks.starters import __main__ as program
from notebooks.starters import tasks as module
from notebooks.starters.blank import Blank, functions, starter, unwritten
from notebooks.starters.check import Result, Verdict, follow, judge, read
from notebooks.starters.tasks import ROOT, Task, tasks
from tests.depth import DEEP
from tests.notebooks.mistakes import MISTAKES
from tests.test_makefile import make, planned

TASKS = {task.name: task for task in tasks()}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "MINE", tmp_path)
    return tmp_path


def solve(task: Task) -> None:
    """The lesson itself over the starter."""
    task.write(fresh=False)
    for lesson in task.lessons:
        shutil.copy(ROOT / lesson, task.mine(lesson))


def edit(task: Task, old: str, new: str) -> None:
    """Change the one place in the learner's files."""
    [mine] = [task.mine(lesson) for lesson in task.lessons if old in task.mine(lesson).read_text()]
    assert mine.read_text().count(old) == 1
    mine.write_text(mine.read_text().replace(old, new))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        run_app(program.app, words)
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return output.out


# -- starters ---------------------------------------------------------------------------------------------------------


@every_task
def test_a_starter_is_the_lesson_without_the_bodies(task: Task) -> None:
    for lesson in task.lessons:
        source, made = (ROOT / lesson).read_text(), task.starter(lesson)
        before, after = (functions(ast.parse(text)) for text in (source, made))
        blanked = {blank.function for blank in task.blanks if Path(blank.file) == lesson}
        assert set(unwritten(ast.parse(made))) == blanked
        assert before.keys() == after.keys()
        for name, function in before.items():
            assert ast.unparse(function.args) == ast.unparse(after[name].args)
            assert ast.get_docstring(function) == ast.get_docstring(after[name])
            assert name in blanked or ast.dump(function) == ast.dump(after[name]), f"{name} has changed"
        new = [line[2:].strip() for line in difflib.ndiff(source.splitlines(), made.splitlines()) if line[:1] == "+"]
        assert all(line.startswith(("# ", "raise NotImplementedError(")) for line in new), new
        assert max(map(len, made.splitlines())) <= 120


def test_a_blank_that_no_longer_fits_its_lesson_is_an_error() -> None:
    with pytest.raises(LookupError, match="no statement begins with 'gone'"):
        starter("def f():\n    here = 1\n", [Blank("f.py", "f", "Write it.", start="gone")])
    with pytest.raises(KeyError, match="g"):
        starter("def f():\n    here = 1\n", [Blank("f.py", "g", "Write it.")])


def test_the_readme_names_every_task() -> None:
    text = (ROOT / "notebooks/starters/README.md").read_text()
    rows = re.findall(r"^\| (m\d) `([^`]+)` \|[^|]*\| ?(?:\"(.*)\")? ?\|$", text, flags=re.M)
    assert rows == [(task.short, task.name, task.asked) for task in tasks()]


# -- the program ------------------------------------------------------------------------------------------------------


def test_the_first_call_writes_and_no_call_overwrites(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "m4")
    path = mine / "m4" / "attention.py"
    assert "YOURS: " in path.read_text()
    assert "`attend_blocks`" in text and "The idea" in text and text.endswith("`make stage4 build`\n")
    assert said(capsys, "m4") == text, "nothing is written yet: the same again"
    path.write_text("mine")
    assert "no Python" not in said(capsys) and "in work" in said(capsys)
    said(capsys, "m4")
    assert path.read_text() == "mine"
    said(capsys, "m4", "--fresh")
    assert "YOURS: " in path.read_text() and path.with_suffix(".py.bak").read_text() == "mine"
    path.write_text("mine again")
    said(capsys, "m4", "--fresh")
    assert path.with_suffix(".py.bak").read_text() == "mine" and "again" in path.with_suffix(".py.bak1").read_text()


def test_a_stage_of_several_tasks_writes_all_or_the_one_that_is_named(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "make stage3 build TASK=pool" in said(capsys, "m3", "--task", "pool")
    assert [path.name for path in (mine / "m3").iterdir()] == ["block_pool.py"]
    said(capsys, "m3")
    assert sorted(path.name for path in (mine / "m3").iterdir()) == [
        "attention.py", "batch.py", "block_pool.py", "kv_cache.py"]  # fmt: skip
    with pytest.raises(SystemExit):
        run_app(program.app, ["m3", "--task", "nonsense"])
    assert "pool, tables, lookup" in capsys.readouterr().err


def test_stages_named_together_have_each_its_explanation(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "m0", "m4")
    assert text.endswith("`make stage0 stage4 build`\n")
    assert "stages/m0_baseline/README.md, under `The code`" in text
    assert "stages/m4_flash_attention/README.md, under `The idea`" in text
    assert said(capsys, "m0", "--task", "rope").endswith("`make stage0 build TASK=rope`\n")


@every_task
def test_the_section_that_explains_a_task_exists(task: Task) -> None:
    text = (ROOT / "stages" / task.stage / "README.md").read_text()
    section = text.partition(f"\n## {task.section}\n")[2].partition("\n## ")[0]
    assert len(section) > 400 and "There is none yet" not in section
    assert task.stage != "m0_baseline" or f"**{task.name.capitalize()}**".lower() in section.lower()


def test_beginning_again_needs_a_stage(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_app(program.app, ["--fresh"])
    assert end.value.code == 2 and "FRESH=1 needs a stage" in capsys.readouterr().err


def test_a_file_that_was_right_is_in_work_once_it_changes(mine: Path) -> None:
    task = TASKS["pool"]
    assert task.state() == "not started"
    task.write(fresh=False)
    assert task.state() == "not started"
    solve(task)
    assert task.state() == "in work"
    task.remember()
    assert task.state() == "right"
    edit(task, "released twice", "released again")
    assert task.state() == "in work"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("for block in taken:", "for block in taken", "This is no Python yet: expected ':'"),
        ("def take(self, count: int) -> list[int]:\n",
         "def take(self, number: int) -> list[int]:\n", "The engine calls it with (self, count)"),
        ("class BlockPool:", "class Pools:", "`BlockPool` is gone"),
        ("def share(self, blocks: Sequence[int]) -> None:\n",
         "def lend(self, blocks: Sequence[int]) -> None:\n", "`BlockPool.share` is gone"),
        ("import Sequence\n", "import Sequenz\n", "The file cannot be imported: ImportError: cannot import"),
        ("        return taken\n", "        while True:\n            pass\n",
         "Not done after 3 s of CPU time: an endless loop? It was at"),
        ("        return taken\n", "        import os\n        os._exit(0)\n", "your code ends the process"),
        ("class BlockPool:", "import sys\n\nsys.exit(0)\n\n\nclass BlockPool:",
         "The file cannot be imported: SystemExit: 0\n"),
        ("for block in taken:", "for block in taken:\0",
         "This is no Python yet: source code string cannot contain null"),
    ],
    ids=["syntax", "signature", "class", "method", "import", "endless loop", "exit", "exit at once", "null"],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_in_a_line(mine: Path, old: str, new: str, says: str) -> None:
    solve(TASKS["pool"])
    edit(TASKS["pool"], old, new)
    verdict = judge(TASKS["pool"], limit=3 if "endless" in says else 60)
    assert says in verdict.problem and not verdict.right
    assert "block_pool.py" in verdict.problem or "take" in verdict.problem or "test_taken" in verdict.problem


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("m3/block_pool.py", "", "Rename what is in its place"),
        (".right.json", "", "Rename what is in its place"),
        (".right.json", "{", ".right.json is broken: delete it"),
        (".right.json", "[1]", ".right.json is broken: delete it"),
        ("m3", "a file", "Rename what is in its place"),
    ],
)
def test_what_the_reader_broke_is_said_in_a_line(
    mine: Path, capsys: pytest.CaptureFixture[str], path: str, content: str, says: str
) -> None:
    """Without a content: a folder."""
    if path.startswith("."):
        solve(TASKS["pool"])
    (mine / path).write_text(content) if content else (mine / path).mkdir(parents=True)
    for words in (["m3", "--task", "pool"], []):
        with pytest.raises(SystemExit) as end:
            run_app(program.app, words)
        error = capsys.readouterr().err
        assert end.value.code == 2 and says in error and len(error.splitlines()) == 1


def test_a_file_in_another_encoding_is_no_python_yet(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve(TASKS["pool"])
    path = mine / "m3" / "block_pool.py"
    path.write_bytes(b"# caf\xe9\n" + path.read_bytes())
    assert "in work" in said(capsys, "--task", "pool")
    assert "This is no Python yet: 'utf-8' codec can't decode" in said(capsys, "m3", "--task", "pool")
    said(capsys, "m3", "--task", "pool", "--fresh")
    assert b"\xe9" in path.with_suffix(".py.bak").read_bytes()


def test_parameters_may_be_positional_only(mine: Path) -> None:
    solve(TASKS["pool"])
    path = mine / "m3" / "block_pool.py"
    path.write_text(path.read_text().replace("def take(self, count: int)", "def take(self, count: int, /)"))
    assert ", /)" in path.read_text() and read(TASKS["pool"], Verdict([])) == ""


@pytest.mark.slow
def test_only_computing_counts_as_too_slow(mine: Path) -> None:
    """As on a busy machine: a test takes longer than the limit, and its process did not get the time."""
    solve(TASKS["pool"])
    edit(TASKS["pool"], "        return taken\n", "        __import__('time').sleep(0.5)\n        return taken\n")
    task = replace(TASKS["pool"], checks=TASKS["pool"].checks[:1])
    limit = 0.8
    job = {"modules": task.modules(), "tests": task.tests, "only": {}, "limit": limit}
    command = [sys.executable, "-m", "tests.learner", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert '"end"' in done.stdout and done.returncode == 0


def test_half_of_the_work_is_checked_and_the_rest_is_named(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = TASKS["pool"]
    solve(task)
    source = (ROOT / task.lessons[0]).read_text()
    share = [blank for blank in task.blanks if blank.function == "BlockPool.share"]
    task.mine(task.lessons[0]).write_text(starter(source, share))
    edit(task, "self._free.pop() for", "print('looking') or self._free.pop() for")
    edit(task, "                self._free.append(block)", "                pass")
    text = said(capsys, "m3", "--task", "pool")
    assert "not yet written: `BlockPool.share`: Count one more owner" in text
    assert "✓ Blocks that are taken are different ones" in text
    assert "✗ A released block can be taken again\n      tried     `num_free` after one of 2 blocks is released" in text
    assert "came out  0\n      expected  1" in text and "printed   looking" in text
    assert "hint      When the count of a block reaches 0, the block goes back" in text
    assert "· A shared block is free only" in text and "Traceback" not in text


def test_a_right_solution_runs_in_an_engine(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From the check to the demonstration. The learner's file says that it is there."""
    task = TASKS["lookup"]
    solve(task)
    edit(task, "class PagedBatches:", "print('on my own code')\n\n\nclass PagedBatches:")
    tiny = ["generate", "--model", "random:tiny-llama", "--max-tokens", "3", "--token-ids", "5, 6, 7"]
    before, task.demo[:] = list(task.demo), tiny
    with pytest.raises(SystemExit) as end:
        run_app(program.app, ["m3", "--task", "lookup"])
    text = capfd.readouterr().out
    task.demo[:] = before
    assert end.value.code == 0 and "✗" not in text and "·" not in text
    assert "Right." in text and "on my own code" in text and "diff " in text
    assert task.state() == "right"


def test_make_says_which_stages_which_task_and_whether_to_begin_again() -> None:
    assert planned("build").endswith("-m notebooks.starters")
    command = planned("stage3", "stage5", "build", "TASK=pool", "FRESH=1")
    assert command.endswith("-m notebooks.starters m3 m5 --task pool --fresh")
    assert "are for build only" in make("test", "FRESH=1", python=None).stderr


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Task, str, str, Verdict]]:
    """(task, new text, hint, verdict) of each mistake; without the deep run, of each task's first."""
    found: list[tuple[Task, str, str, Verdict]] = []
    jobs: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        for task in TASKS.values():
            for old, new, hint in MISTAKES[task.name][: None if DEEP else 1]:
                patch.setattr(module, "MINE", tmp_path_factory.mktemp("mine"))
                solve(task)
                edit(task, old, new)
                steps = [test for test in task.tests if "test_steps" in test]
                jobs.append({"modules": task.modules(), "tests": steps, "only": {}, "limit": 60, "stop_first": True})
                found.append((task, new, hint, Verdict([Result(check) for check in task.checks])))
        command = [sys.executable, "-m", "tests.notebooks.judge_many"]
        done = subprocess.run(command, cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True, check=True)
        for (task, _, _, verdict), output in zip(found, json.loads(done.stdout), strict=True):
            follow(output.splitlines(), verdict, task, 60, lambda count: None)
    return found


def test_each_mistake_is_refused_with_the_hint_meant_for_it(judged: list[tuple[Task, str, str, Verdict]]) -> None:
    wrong: list[str] = []
    for task, new, hint, verdict in judged:
        if verdict.failure is None or hint not in verdict.failure.check.hint:
            wrong.append(f"{task.name}: {new.strip()!r} meets {verdict.failure and verdict.failure.check.hint!r}")
    assert wrong == []


def test_every_task_has_mistakes_and_every_hint_of_a_step_is_needed() -> None:
    assert MISTAKES.keys() == TASKS.keys() and all(len(entries) >= 3 for entries in MISTAKES.values())
    assert all(hint for entries in MISTAKES.values() for _, _, hint in entries)
    for name, entries in MISTAKES.items():
        hints = [check.hint for check in TASKS[name].checks]
        assert [hint for _, _, hint in entries if not any(hint in text for text in hints)] == []


# -- the whole check --------------------------------------------------------------------------------------------------


def test_every_test_that_a_check_names_exists() -> None:
    """By the source; the slow test below runs them."""
    for name in {test.partition("[")[0] for task in TASKS.values() for test in task.tests}:
        file, _, function = name.partition("::")
        assert re.search(rf"^(def )?{function}\b", (ROOT / file).read_text(), flags=re.M), name


@pytest.mark.slow
@every_task
def test_the_lesson_itself_is_right(mine: Path, task: Task) -> None:
    solve(task)
    verdict = judge(task)
    assert verdict.right, [(result.check.says, result.status, result.failure) for result in verdict.results]
