"""`benchmarks.fused`, at sizes that measure nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fused
from common.errors import UserError
from common.execution.gpu import triton_skinny

SMALL = replace(fused.PRESETS["tiny-qwen3"], vocab_size=48, intermediate_size=64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_operation_is_in_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused.PRESETS, "tiny-qwen3", SMALL)
    monkeypatch.setattr(triton_skinny, "MIN_PROGRAMS", 1)  # few and large ones: each takes the interpreter milliseconds
    path = tmp_path / "fused.json"
    results = fused.run(DEVICE, "fp16", "tiny-qwen3", path, True)
    assert json.loads(path.read_text()) == results
    found = {(r["name"], r["rows"]) for r in results["records"]}
    assert len(found) == 24
    assert {"norm + qkv", "o + residual", "QK-norm + rotary", "pick by chance"} <= {name for name, _ in found}
    assert all(min(r["fused"], r["apart"], r["plain"], r["gb_per_s"]) > 0 for r in results["records"])
    assert "of copy" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="need a GPU"):
        fused.run("cpu", "fp32", "tiny-qwen3", tmp_path / "fused.json", True)
