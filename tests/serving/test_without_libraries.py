"""What is left of `serve` where its libraries are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.serving.conftest import missing
from tests.test_cli import TINY

SCRIPT = """
import runpy, sys
sys.modules["uvicorn"] = sys.modules["fastapi"] = None  # as if they were not installed
runpy.run_module("stages.m3_paged_kv", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(bool(missing()), reason=f"the server's tests need {', '.join(missing())}: make setup")
def test_the_libraries_of_the_other_tests_are_here() -> None:
    assert missing() == []


def test_serve_without_them_is_one_line() -> None:
    """In a process of its own: modules that are imported anew stay behind as attributes of their packages."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, "serve", *TINY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() in (
        [f"error: this needs {name}, which is not installed: pip install '.[serve]'"] for name in ("uvicorn", "fastapi")
    )
