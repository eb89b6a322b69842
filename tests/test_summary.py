"""The last 30 lines of a run say why tests failed, what was slow, and how long all of it took."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = f"""import sys, types
sys.modules["tests"] = tests = types.ModuleType("tests")
tests.__path__ = [{str(Path(__file__).parent)!r}]
from tests.summary import pytest_terminal_summary
"""
"""With a package `tests` that does not import PyTorch."""


def last_lines(folder: Path, source: str) -> list[str]:
    """Of pytest and make, which adds one line where a run fails."""
    (folder / "test_it.py").write_text(source)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FOLOVLLM_", "PYTEST_"))}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # starts sooner
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return [*ended.stdout.splitlines(), "make: *** [Makefile:167: test] Error 1"][-30:]


def check_time_and_slowest(lines: list[str]) -> None:
    assert sum(" s  test_it.py::" in line for line in lines) == 10
    assert sum(line.startswith("all of it took ") for line in lines) == 1


@pytest.mark.parametrize("count", [1, 5, 6, 7, 8, 9, 15])
def test_each_failure_has_its_reason_time_and_the_ten_slowest(tmp_path: Path, count: int) -> None:
    source = "import pytest\n" + "".join(
        f"def test_fails_{number}():\n    raise ValueError('\\n\\nreason {number}.\\n\\n\\nmore of {number}.')\n"
        for number in range(count)
    )
    source += "@pytest.mark.parametrize('number', range(12))\ndef test_passes(number):\n    pass\n"
    lines = last_lines(tmp_path, source)
    check_time_and_slowest(lines)
    why = lines[next(number for number, line in enumerate(lines) if " why " in line) :]
    for number in range(count):
        assert any(f"test_fails_{number}" in line for line in why)
        assert any(f"reason {number}." in line for line in why)
    if count > 8:
        assert all(f"test_fails_{n}" in line and f"reason {n}." in line for n, line in enumerate(why[1 : count + 1]))


def test_many_failures_share_the_lines_of_their_reasons(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.parametrize('number', range(60))\ndef test_fails(number):\n"
    lines = last_lines(tmp_path, source + "    raise ValueError(f'reason {number % 15}.')\n")
    check_time_and_slowest(lines)
    assert all(sum(f" and 3 more: ValueError: reason {number}." in line for line in lines) == 1 for number in range(15))


def test_more_reasons_than_there_is_room_for_are_shown_before_the_slowest(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.parametrize('number', range(25))\ndef test_fails(number):\n"
    lines = last_lines(tmp_path, source + "    raise ValueError(f'reason {number}.')\n")
    assert all(any(f"ValueError: reason {number}." in line for line in lines) for number in range(25))


def test_tensors_that_differ_say_how_far_they_are_apart(tmp_path: Path) -> None:
    source = "import torch\ndef test_close():\n    torch.testing.assert_close(torch.zeros(3), torch.ones(3))\n"
    source += "def test_import():\n    import no_such_module\n"
    lines = last_lines(tmp_path, source)
    assert "    AssertionError: Tensor-likes are not close!" in lines
    assert any(line.startswith("    Greatest absolute difference: 1.0 ") for line in lines)
    assert "    ModuleNotFoundError: No module named 'no_such_module'" in lines
