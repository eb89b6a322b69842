"""What decoding could reach by the ceilings of a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.limits import Ceilings, measure, tokens_per_s
from benchmarks.recipes import BenchRequest
from benchmarks.workloads import find_size
from common.models.sources.random_weights import PRESETS

H100 = Ceilings(copy=3.0e12, matmul=700e12)
QWEN3 = PRESETS["qwen3-0.6b"]


@pytest.mark.parametrize(("workload", "by_hand"), [("decode_one", 2450), ("nano", 24_300)])
def test_the_limit_is_the_one_worked_out_by_hand(workload: str, by_hand: float) -> None:
    requests = find_size(workload, None, "gpu").requests(QWEN3.vocab_size)
    assert tokens_per_s(requests, QWEN3, torch.bfloat16, H100) == pytest.approx(by_hand, rel=0.06)


def test_two_requests_read_the_weights_once_and_both_contexts() -> None:
    def seconds(count: int, tokens: int) -> float:
        requests = [BenchRequest([1] * 100, tokens)] * count
        return count * tokens / tokens_per_s(requests, QWEN3, torch.bfloat16, Ceilings(3.0e12, float("inf")))

    weights = seconds(1, 1) - (seconds(2, 1) - seconds(1, 1))  # the second one adds its context alone
    assert weights == pytest.approx(2 * 596e6 / 3.0e12, rel=0.01)
    assert seconds(1, 2) > 2 * seconds(1, 1)  # the context grows


def test_ceilings_are_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    limits = measure(path, ["decode_one", "nano"], "random:tiny-qwen3", "fp32", "cpu", True)
    written = json.loads(path.read_text())
    assert {r["workload"]: r["output_tokens_per_s"] for r in written["records"]} == limits
    assert min(limits.values()) > 0
    assert written["ceilings"]["copy_gb_per_s"] > 0 and written["environment"]["hardware"]
