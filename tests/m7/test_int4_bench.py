"""`benchmarks.int4`, at sizes that measure nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import int4


def test_every_layer_is_measured_at_every_number_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = int4.run("cpu", tmp_path / "int4.json", quick=True, out_dir=tmp_path)
    assert json.loads((tmp_path / "int4.json").read_text()) == results
    assert (tmp_path / "int4.png").stat().st_size > 10_000
    for layer in ("bf16", "int4"):
        assert [r["rows"] for r in results["records"] if r["layer"] == layer] == [1, 2]
    assert all(r["seconds"] > 0 and r["share"] > 0 for r in results["records"])
    assert all(r["speedup"] == 1 for r in results["records"] if r["layer"] == "bf16")
    assert "small 128 → 64" in capsys.readouterr().out
