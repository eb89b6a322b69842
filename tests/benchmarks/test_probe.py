"""The extra run: time inside attention, and memory that comes and goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.contestant import Setting
from benchmarks.measure import AttentionClock
from benchmarks.stage_contestant import StageContestant
from benchmarks.worker import probe
from benchmarks.workloads import find_size
from common.watch.peak_memory import ActivationPeak

CPU = torch.device("cpu")
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset on Linux only")


class SlowAttention:
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return q + layer


def test_the_clock_adds_up_all_calls_and_leaves_the_results_alone() -> None:
    attention, one = SlowAttention(), torch.ones(1)
    clock = AttentionClock(attention, CPU, lambda: 3)  # type: ignore[arg-type]
    with clock:
        results = [attention.attend(layer, one, one, one).item() for layer in range(3)]
        time.sleep(0.05)  # not in attention
    assert results == [1, 2, 3]
    seconds = clock.seconds()
    assert seconds is not None
    assert seconds >= 0.03
    attention.attend(0, one, one, one)
    assert clock.seconds() == seconds, "after its block the clock stands"


def test_calls_that_went_past_the_clock_leave_no_figure() -> None:
    attention, one = SlowAttention(), torch.ones(1)
    clock = AttentionClock(attention, CPU, lambda: 2)  # type: ignore[arg-type]
    with clock:
        attention.attend(0, one, one, one)
    assert clock.seconds() is None


@needs_linux
def test_activations_are_the_peak_over_what_was_there() -> None:
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    with ActivationPeak(CPU) as peak:
        for _ in range(2):
            scratch = torch.ones(48 << 20, dtype=torch.uint8)
            del scratch
    assert kept.sum() > 0
    assert peak.bytes == pytest.approx(48 << 20, abs=6 << 20), "neither 64 more nor twice 48"


@pytest.mark.parametrize("stage", ["m0", "m1", "m2", "m3", "m4"])
def test_every_stage_can_be_probed(stage: str) -> None:
    size = find_size("long_context", "prompt=2048", "quick")
    contestant = StageContestant(stage, Setting.of("random:tiny-llama", "fp32", "cpu", size, {}))
    try:
        requests = size.requests(contestant.vocab_size)
        contestant.run(requests, lambda tokens: None)
        start = time.perf_counter()
        seconds, bytes_ = probe(contestant, requests, CPU)
        assert seconds is not None, "every step's attention was seen"
        assert 0 < seconds < time.perf_counter() - start
        assert bytes_ is None or bytes_ >= 0
    finally:
        contestant.close()
