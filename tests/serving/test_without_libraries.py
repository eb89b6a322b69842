"""What is left of `serve` where its libraries are not installed."""

from __future__ import annotations

import sys

import pytest

from tests.serving.conftest import missing
from tests.test_cli import TINY, cli


@pytest.mark.skipif(bool(missing()), reason=f"the server's tests need {', '.join(missing())}: make setup")
def test_the_libraries_of_the_other_tests_are_here() -> None:
    assert missing() == []


def test_serve_without_them_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("common.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli("serve", *TINY) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() in (
        [f"error: serve needs {name}, which is not installed: pip install '.[serve]'"]
        for name in ("uvicorn", "fastapi")
    )
