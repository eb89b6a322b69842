"""`benchmarks.int4`, at sizes that measure nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import int4
from common import UserError


def test_every_layer_is_measured_at_every_number_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = int4.run("cpu", tmp_path / "int4.json", quick=True, out_dir=tmp_path)
    assert json.loads((tmp_path / "int4.json").read_text()) == results
    assert (tmp_path / "int4.png").stat().st_size > 10_000
    for layer in ("bf16", "int4"):
        assert [r["rows"] for r in results["records"] if r["layer"] == layer] == [1, 2]
    assert all(r["seconds"] > 0 and r["share"] > 0 for r in results["records"])
    assert all(r["speedup"] == 1 for r in results["records"] if r["layer"] == "bf16")
    assert "small 128 → 64" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not lose or repeat what it measured."""
    path = tmp_path / "int4.json"
    monkeypatch.setattr(int4, "QUICK_SHAPES", {"one": (128, 64), "two": (64, 64)})
    real, calls = int4.measure, []

    def stops(name: str, *rest: Any) -> list[dict[str, Any]]:
        calls.append(name)
        if calls == ["one", "two"]:
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(int4, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        int4.run("cpu", path, quick=True, out_dir=tmp_path)
    before = json.loads(path.read_text())["records"]
    assert {r["shape"] for r in before} == {"one"}
    results = int4.run("cpu", path, quick=True, out_dir=tmp_path, resume=True)
    assert calls == ["one", "two", "two"]
    assert results["records"][: len(before)] == before
    assert list(dict.fromkeys(r["shape"] for r in results["records"])) == ["one", "two"]
    monkeypatch.setattr(int4, "ROWS", (1, 4))
    with pytest.raises(UserError, match="leave out --resume"):
        int4.run("cpu", path, quick=True, out_dir=tmp_path, resume=True)
