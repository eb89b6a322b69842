"""Tables and pictures of `interference`, `shared_prefix` and `multi_turn`, on made-up figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks.compare import Results, jobs, make_comparison
from benchmarks.plots import draw_all
from benchmarks.plots.chunk_size import chunk_size
from benchmarks.plots.hit_rate import by_turn, hit_rate
from benchmarks.plots.latency import latency
from benchmarks.plots.stalls import stalls
from benchmarks.recipes import LONG, SHORT, STEADY
from benchmarks.record import Record, Summary
from benchmarks.table import render


def same(seconds: float) -> Summary:
    return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), seconds)


def record(stage: str, workload: str, variant: str | None, ttft: float, gap: float, **rest: Any) -> Record:
    return Record(stage, workload, repeats=1, output_tokens_per_s=100.0, output_tokens_per_s_repeats=[100.0],
                  ttft_s=same(ttft), itl_s=same(gap), e2e_s=same(1.0), variant=variant, **rest)  # fmt: skip


@pytest.fixture
def results() -> Results:
    """m4, m5 and m6: m5's gaps are a tenth of m4's, m6's first tokens come ten times sooner at 95 % hits."""
    workloads = ["interference", "shared_prefix", "multi_turn"]
    plan = make_comparison(["m4"], workloads, peers=False, dtype="bf16", device="cpu", model="random:tiny-llama")
    plan.contestants = ["m4", "m5", "m6"]
    found = Results({"hardware": {"cpu": "a CPU", "threads": 1}}, plan.config())

    def waits(long: float, short: float) -> dict[str, Summary]:
        return {STEADY: same(0.1), LONG: same(long), SHORT: same(short)}

    found.add(record("m4", "interference", None, 0.5, 1.0, ttft_by_group=waits(1.0, 1.1)))
    found.add(record("m5", "interference", None, 0.5, 0.1, ttft_by_group=waits(1.5, 1.6)))
    for chunk, gap, long in (("32", 0.02, 4.0), ("1024", 0.5, 1.2), ("auto", 0.05, 2.0)):
        found.add(record("m5", "interference", f"chunk={chunk}", 0.5, gap, ttft_by_group=waits(long, long)))
    for workload in ("shared_prefix", "multi_turn"):
        for stage, cold, hot in (("m5", 0.5, 0.5), ("m6", 0.51, 0.05)):
            turns = {f"turn {n}": same(hot) for n in (1, 2, 3)} if workload == "multi_turn" else None
            found.add(record(stage, workload, None, hot, 0.01, ttft_by_group=turns, prefix_hit_rate=0.95,
                             tokens_saved=12345, blocks_shared=768, evictions=2))  # fmt: skip
            found.add(record(stage, workload, "hit_rate=0", cold, 0.01))
    return found


@pytest.mark.parametrize(
    ("draw", "workload", "finding"),
    [
        (stalls, "interference", "While long prompts arrive, the p99 time between tokens is 100 ms with m5 chunked "
         "prefill, 1.0 s with m4 flash attention; the long prompt waits 1.5 times as long"),
        (chunk_size, "interference", "From chunks of 32 to 1024, the p99 time between tokens goes from 20 ms to "
         "500 ms, and the long prompt's first token from 4.0 s to 1.2 s"),
        (hit_rate, "shared_prefix", "At 95 % hits the first token comes after 50.0 ms with m6 prefix caching, after "
         "500 ms with m5 chunked prefill (10 times as long); without hits m6 is 2.0% later"),
        (by_turn, "multi_turn", "The first token of turn 3 comes after 50.0 ms with m6 prefix caching, after 500 ms "
         "with m5 chunked prefill"),
    ],
)  # fmt: skip
def test_the_title_states_the_finding(draw: Any, workload: str, finding: str, results: Results) -> None:
    figure = draw(results, workload)
    title = figure.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    plt.close(figure)
    assert title == finding


def test_pictures_are_drawn_where_there_are_figures_and_are_not_blank(results: Results, tmp_path: Path) -> None:
    names = {path.name for path in draw_all(results, tmp_path)}
    own = {"interference-stalls.png", "interference-chunk-size.png", "shared_prefix-hit-rate.png",
           "multi_turn-hit-rate.png", "multi_turn-by-turn.png"}  # fmt: skip
    assert own <= names
    assert all(np.std(matplotlib.image.imread(tmp_path / name)) > 0.03 for name in own)
    assert "shared_prefix-by-turn.png" not in names
    assert latency(results, "interference") is None, "one figure over all groups would tell nothing"


@pytest.mark.parametrize("draw", [stalls, chunk_size, hit_rate, by_turn])
def test_without_figures_there_is_no_picture(draw: Any, results: Results) -> None:
    results.records, results.sweeps = [record("m5", "single", None, 0.5, 0.1)], []
    assert all(draw(results, workload) is None for workload in ("single", "interference", "multi_turn"))


def test_tables_tell_what_the_workload_is_about(results: Results) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(results))
    text = console.export_text()
    assert "1500 / 1600" in text, "TTFT of the long and the short prompts"
    assert "12,345" in text
    assert "768 / 2" in text
    assert "sweep of interference: p99 time between tokens" in text
    assert "sweep of shared_prefix: median time to the first token" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_chunk_sizes_are_for_stages_that_have_them_and_peers_are_left_out() -> None:
    plan = make_comparison(["m3", "m4", "llama.cpp BF16"], ["interference", "multi_turn"], peers=False, dtype="bf16",
                           device="cpu", model="random:tiny-llama", sweep=True)  # fmt: skip
    points = [(job.stage, job.workload) for job in jobs(plan) if job.variant]
    assert points == [(stage, "multi_turn") for _ in range(3) for stage in ("m3", "m4")]
