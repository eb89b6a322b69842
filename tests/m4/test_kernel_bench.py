"""`benchmarks.attention`, at sizes that measure nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attention
from benchmarks.attention import Step


def test_every_backend_is_in_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.HEADS, "cpu", (4, 2, 64))
    results = attention.run("cpu", "fp32", tmp_path / "kernels.json", quick=True, out_dir=tmp_path)
    assert json.loads((tmp_path / "kernels.json").read_text()) == results
    assert (tmp_path / "attention-roofline.png").stat().st_size > 10_000
    for step in attention.QUICK:
        rows = {r["backend"]: r for r in results["records"] if r["step"] == step.label}
        assert {"naive", "torch", "cpu", "contiguous"} <= rows.keys()
        assert all(r["error"] is None and r["seconds"] > 0 and r["share"] > 0 for r in rows.values())
    assert results["config"]["refused"]["flash_attn"]
    assert "decode 2 × 40" in capsys.readouterr().out


def test_work_of_a_chunk_counts_no_hidden_key() -> None:
    assert Step(1, 1, 100).pairs == 100
    assert Step(2, 3, 3).pairs == 2 * (1 + 2 + 3)
    assert Step(1, 2, 10).pairs == 9 + 10


def test_rate_is_work_divided_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stages.m4_flash_attention.fast.backends import AttentionShape

    monkeypatch.setattr(attention, "seconds_per_call", lambda *_: 0.5)
    shape = AttentionShape(4, 2, 64, 16, torch.float32, torch.device("cpu"))
    decode = attention.measure("naive", shape, Step(2, 1, 40), copy=1e6, matmul=1e9, quick=True)
    assert decode["rate"] == pytest.approx(2 * 2 * 40 * 2 * 64 * 4 / 0.5 / 1e9)
    assert decode["share"] == pytest.approx(2 * 2 * 40 * 2 * 64 * 4 / 0.5 / 1e6)
    prefill = attention.measure("naive", shape, Step(1, 2, 10), copy=1e6, matmul=1e9, quick=True)
    assert prefill["rate"] == pytest.approx(4 * 4 * 64 * 19 / 0.5 / 1e12)
