"""`diff`: what a stage rewrote, against what it replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.cli.diff import changes, diff_lines, unchanged
from tests.test_cli import ROOT, cli


def test_diff_holds_a_module_against_the_latest_earlier_stage_that_has_it(tmp_path: Path) -> None:
    for path, text in {
        "m0_a/engine.py": "a = 0\n",
        "m0_a/cache.py": "c = 0\n",
        "m1_b/engine.py": "from stages.m0_a.cache import c\n",
        "m2_c/engine.py": "from stages.m0_a.cache import c\nfrom stages.m2_c.new import n\n",
        "m2_c/new.py": "n = 2\n",
        "m1_b/kernels/add.py": "k = 1\n",
        "m2_c/kernels/__init__.py": '"""Kernels."""\n',
        "m2_c/kernels/add.py": "k = 2\n",
        "m2_c/backends/__init__.py": '"""Backends."""\n\nb = 2\n',
        "m2_c/cache.py": "c = 2\n",
        "m2_c/__init__.py": "",
        "m3_d/cache.py": "c = 3\n",
    }.items():
        (tmp_path / "stages" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stages" / path).write_text(text)
    m2 = tmp_path / "stages" / "m2_c"
    found = {change.path.relative_to(m2).as_posix(): change for change in changes(m2)}
    assert list(found) == ["backends/__init__.py", "cache.py", "engine.py", "kernels/add.py", "new.py"]
    assert found["kernels/add.py"].replaces == tmp_path / "stages/m1_b/kernels/add.py"
    assert found["backends/__init__.py"].replaces is None
    assert found["cache.py"].replaces == tmp_path / "stages/m0_a/cache.py"
    assert found["engine.py"].replaces == tmp_path / "stages/m1_b/engine.py"
    assert found["new.py"].replaces is None
    assert list(diff_lines(found["new.py"], tmp_path)) == ["new: stages/m2_c/new.py (1 lines)"]
    assert list(diff_lines(found["cache.py"], tmp_path))[-2:] == ["-c = 0", "+c = 2"]
    assert unchanged(m2) == ["stages/m0_a/cache.py"]


def test_diff_shows_what_a_stage_rewrote_in_colour_only_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("diff") == 0
    plain = capsys.readouterr().out
    assert "\x1b[" not in plain
    assert "--- stages/m0_baseline/attention.py" in plain
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
