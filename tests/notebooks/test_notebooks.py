"""Every notebook: a pair in step, complete, without errors, with exercises whose checks tell right from wrong."""

from __future__ import annotations

import ast
import json
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.exercises import Verdict
from notebooks.pairs import FOLDER, names, notebook_path, read_source

SECTIONS = [
    "The problem",
    "The idea",
    "The code",
    "Measured",
    "The picture",
    "Where it loses",
    "Exercises",
    "Interview questions",
]
NAMES = names()
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def texts(notebook: Any, kind: str) -> Iterator[str]:
    return (cell.source for cell in notebook.cells if cell.cell_type == kind)


def read_notebook(name: str) -> Any:
    return nbformat.read(notebook_path(name), as_version=4)


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def outputs(name: str) -> Iterator[tuple[Any, Any]]:
    """All outputs as they are kept, each with its cell."""
    return ((cell, out) for cell in read_notebook(name).cells if cell.cell_type == "code" for out in cell.outputs)


def test_there_is_one_for_every_stage_in_the_order_of_reading() -> None:
    assert NAMES[0] == "00_overview"
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


def test_the_readme_lists_all_in_that_order_with_the_minutes_that_they_name() -> None:
    rows = re.findall(r"^\| \[\w+\]\((\w+)\.ipynb\).*?\| (\d+ min) \| <!--run:(\w+)-->", README, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == [name for _, _, name in rows] == NAMES
    for name, minutes, _ in rows:
        assert f"About {minutes}utes" in read_source(name).cells[0].source


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_in_step(name: str) -> None:
    source, kept = read_source(name), read_notebook(name)
    for number, (ours, theirs) in enumerate(zip(source.cells, kept.cells, strict=False)):
        assert (ours.cell_type, ours.source, tags(ours)) == (theirs.cell_type, theirs.source, tags(theirs)), (
            f"cell {number} of {name}.ipynb is not that of the .py file: make notebooks"
        )
    assert len(source.cells) == len(kept.cells)


@pytest.mark.parametrize("name", NAMES)
def test_all_cells_ran_in_order_and_without_errors(name: str) -> None:
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell, output in outputs(name):
        assert output.output_type != "error", cell.source
        assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("name", NAMES)
def test_outputs_name_no_machine_and_no_folder(name: str) -> None:
    kept = json.dumps([dict(output) for _, output in outputs(name) if "image/png" not in output.get("data", {})])
    assert str(FOLDER.parent) not in kept
    assert str(Path.home()) + "/" not in kept
    assert re.search(r"/(home|Users|tmp)/|0x[0-9a-f]{8}", kept) is None
    assert len(socket.gethostname()) < 6 or socket.gethostname() not in kept
    assert set(read_notebook(name).metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_it_has_all_sections_and_a_picture(name: str) -> None:
    headings = re.findall(r"^## (.+)$", "\n".join(texts(read_source(name), "markdown")), flags=re.MULTILINE)
    assert [next((s for s in SECTIONS if heading.startswith(s)), heading) for heading in headings] == SECTIONS
    assert any("image/png" in output.get("data", {}) for _, output in outputs(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_names_the_questions_that_it_answers(name: str) -> None:
    last = read_source(name).cells[-1].source
    assert re.search(r"\*\*(Q\d+|Follow-up \d+)", last), "the last cell: **Q4: ...**"
    assert "../reports/interview_guide.md" in "\n".join(texts(read_source(name), "markdown"))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("m")])
def test_it_imports_its_stage_and_shows_its_code(name: str) -> None:
    code = "\n".join(texts(read_source(name), "code"))
    assert f"from stages.{name}." in code
    assert "show_source(" in code


def exercises(name: str) -> list[tuple[str, str]]:
    """Each exercise's cell, and the solution folded away behind it."""
    cells = read_source(name).cells
    found: list[tuple[str, str]] = []
    for cell, after in pairwise(cells):
        if "exercise" in tags(cell):
            solution = re.search(r"<details><summary>Solution</summary>\n\n.*?```python\n(.+?)```.*</details>",
                                 after.source, flags=re.DOTALL)  # fmt: skip
            assert solution, f"{name}: no solution behind {cell.source.splitlines()[0]}"
            found.append((cell.source, solution[1]))
    return found


def run(code: str, namespace: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last line."""
    tree = ast.parse(code)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr), "an exercise ends with the call of its check"
    exec(compile(tree, "<cell>", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)


@pytest.mark.parametrize("name", NAMES)
def test_checks_reject_what_is_not_solved_and_accept_the_solution(name: str) -> None:
    [setup] = [cell.source for cell in read_source(name).cells if "setup" in tags(cell)]
    assert len(exercises(name)) == (1 if name == "long_context" else 3)
    for code, solution in exercises(name):
        namespace: dict[str, Any] = {}
        exec(setup, namespace)
        verdict = run(code, namespace)
        assert isinstance(verdict, Verdict)
        assert not verdict.right, f"accepted without a change: {code}"
        assert len(verdict.message) > 30, verdict.message
        assert "broke with" not in verdict.message, verdict.message
        call = code.strip().splitlines()[-1]
        verdict = run(f"{solution}\n{call}", namespace)
        assert verdict.right, f"{call}: {verdict.message}"
