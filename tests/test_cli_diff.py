"""`diff`: the lesson of a stage, file by file in the order in which one reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stages
from common.cli.diff import (
    NO_LESSONS,
    Lesson,
    diff_lines,
    lesson_lines,
    lesson_modules,
    lessons,
    reading_list,
    used_unchanged,
)
from tests.test_cli import ROOT, cli

README = """# m2

| [`ghost.py`](ghost.py) | a table of another section |

## The code

| file | what it holds |
|---|---|
| [`new.py`](new.py) | `n`: what [`n`](new.py#L1) is about |
| [`common/batch.py`](../../common/batch.py) | what lies elsewhere |
| [`cache.py`](cache.py), [`shared.py`](shared.py) | two files in a row |
| [`parts/idea.py`](parts/idea.py) | an idea in a folder |
| [`fast/`](fast) | the same, fast |
| [`fast/add.py`](fast/add.py) | no lesson |

## The invariant

| [`ghost.py`](ghost.py) | a table of another section |
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage m2 behind an m0 and an m1."""
    for path, text in {
        "m0_a/engine.py": "a = 0\n",
        "m0_a/cache.py": "c = 0\n",
        "m0_a/new.py": "n = 0\n",
        "m1_b/engine.py": "from stages.m0_a.cache import c\n",
        "m1_b/new.py": "n = 1\n",
        "m1_b/shared.py": "s = 1\n",
        "m1_b/kernels/__init__.py": '"""Kernels."""\n\nk = 1\n',
        "m1_b/fast/add.py": "k = 1\n",
        "m2_c/README.md": README,
        "m2_c/__init__.py": '"""Nothing but this."""\n',
        "m2_c/__main__.py": "import stages.m1_b.shared\n",
        "m2_c/cache.py": '"""A cache (SOSP \'23,\nsection 4.1). More of it.\n\nAnd more."""\n\nc = 2\n',
        "m2_c/engine.py": "from stages.m1_b.engine import c\n\n\ndef f():\n    from stages.m1_b.kernels import k\n",
        "m2_c/fast/add.py": "from stages.m1_b import new\nfrom stages.m2_c.cache import c\n",
        "m2_c/fast/__init__.py": "\n",
        "m2_c/fast/__pycache__/add.pyc": "",
        "m2_c/new.py": "n = 2\n",
        "m2_c/odd.py": "",
        "m2_c/parts/idea.py": "i = 2\n",
        "m2_c/parts/other.py": "o = 2\n",
        "m3_d/cache.py": "c = 3\n",
    }.items():
        (tmp_path / "stages" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stages" / path).write_text(text)
    return tmp_path / "stages" / "m2_c"


def test_the_order_and_the_sentences_are_those_of_the_readme(folder: Path) -> None:
    found = {lesson.path.relative_to(folder).as_posix(): lesson.about for lesson in lessons(folder)}
    assert list(found.items()) == [
        ("new.py", "`n`: what `n` is about"),
        ("cache.py", "A cache (SOSP '23, section 4.1)."),
        ("parts/idea.py", "an idea in a folder"),
        ("odd.py", ""),  # the table does not name it
        ("engine.py", ""),
    ]


def test_a_file_replaces_the_latest_earlier_one_of_its_name_that_the_stage_does_not_use(folder: Path) -> None:
    found = {lesson.path.name: lesson.replaces for lesson in lessons(folder)}
    earlier = folder.parent
    assert found["cache.py"] == earlier / "m0_a/cache.py"
    assert found["engine.py"] == earlier / "m1_b/engine.py"  # though it takes a part of it
    assert found["new.py"] is None  # `fast/add.py` takes m1's
    assert found["idea.py"] is None and found["odd.py"] is None


def test_unchanged_is_what_any_module_of_the_stage_imports_from_earlier_ones(folder: Path) -> None:
    used = [path.relative_to(folder.parent).as_posix() for path in used_unchanged(folder)]
    assert used == ["m1_b/engine.py", "m1_b/kernels/__init__.py", "m1_b/new.py", "m1_b/shared.py"]


def test_a_file_is_shown_whole_against_what_it_replaces_or_alone(folder: Path) -> None:
    root = folder.parent.parent
    path, old = folder / "parts/idea.py", folder.parent / "m0_a/old.py"
    path.write_text("".join(f"line {i}\n" for i in range(40)))
    old.write_text(path.read_text() + "the end\n")
    alone = [text for _, text in lesson_lines(Lesson(path, "what it says", None), root)]
    assert alone[:3] == ["# idea.py: what it says", "new: stages/m2_c/parts/idea.py (40 lines)", "line 0"]
    assert alone[-1] == "line 39"
    against = [text for _, text in lesson_lines(Lesson(path, "what it says", old), root)]
    assert against[1:3] == ["--- stages/m0_a/old.py", "+++ stages/m2_c/parts/idea.py"]
    assert against[4] == " line 0" and against[-2:] == [" line 39", "-the end"]


def test_a_folder_that_is_no_lesson_is_one_line(folder: Path) -> None:
    assert [text for _, text in diff_lines(folder)][-3:] == [
        "not shown: stages/m2_c/fast/ (2 files, 3 lines): the same, fast",
        "not shown: stages/m2_c/parts/ (1 files, 1 lines)",
        "used unchanged: stages/m1_b/engine.py, stages/m1_b/kernels/__init__.py, stages/m1_b/new.py, "
        "stages/m1_b/shared.py",
    ]


@pytest.mark.parametrize("stage", stages.names())
def test_the_table_of_a_readme_names_the_files_that_are_there(stage: str) -> None:
    """`engine.py`, the wiring list, may be left out: it is shown last."""
    folder = ROOT / "stages" / stage
    listed = reading_list(folder)
    assert [name for name in listed if not (folder / name).exists()] == []
    missing = [name for name in lesson_modules(folder) if name not in listed and name != "engine.py"]
    assert missing == []
    assert [lesson.path.name for lesson in lessons(folder) if not lesson.about] == []
    assert all(name in listed for name in NO_LESSONS[:2] if (folder / name).exists())


def test_diff_shows_what_a_stage_rewrote_in_colour_only_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("diff") == 0
    plain = capsys.readouterr().out
    assert "\x1b[" not in plain
    assert plain.index("# kv_cache.py: `RowCache`") < plain.index("--- stages/m0_baseline/attention.py")
    assert "+++ stages/m1_kv_cache/attention.py" in plain
    assert "used unchanged: stages/m0_baseline/batch.py" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli("diff") == 0
    assert "\x1b[32m" in capsys.readouterr().out


def test_diff_into_a_pipe_that_closes_early_is_no_error() -> None:
    command = f"{sys.executable} -m stages.m1_kv_cache diff | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
