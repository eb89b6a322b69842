"""Percentiles, the median run, and the fields of a record, on numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.recipes import BenchRequest
from benchmarks.record import Record, Run, Timeline, itl_by_position, record_runs, summarize


def run_of(*timelines: list[float], start: float = 10.0) -> Run:
    return Run(start, [Timeline(start, times) for times in timelines], {"peak_running": 2})


def test_percentiles_interpolate_between_neighbours() -> None:
    assert summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        {"mean": 3.0, "p50": 3.0, "p90": 4.6, "p99": 4.96, "max": 5.0}
    )
    assert summarize([]) is None


def test_a_record_holds_what_the_timelines_say() -> None:
    requests = [BenchRequest([1] * 6, 3), BenchRequest([1] * 4, 1)]
    record = record_runs("m1", "mixed", requests, [run_of([11.0, 12.0, 14.0], [12.0])])
    assert record.output_tokens_per_s == pytest.approx(4 / 4)
    assert record.total_tokens_per_s == pytest.approx((10 + 4) / 4)
    assert record.requests_per_s == pytest.approx(2 / 4)
    assert record.ttft_s
    assert record.ttft_s["max"] == pytest.approx(2.0)
    assert record.itl_s
    assert record.itl_s["mean"] == pytest.approx(1.5)
    assert record.tpot_s == pytest.approx({"mean": 1.5, "p50": 1.5, "p90": 1.5, "p99": 1.5, "max": 1.5})
    assert record.e2e_s
    assert record.e2e_s["p50"] == pytest.approx(3.0)
    assert record.peak_running == 2
    assert record.preemptions is None
    assert record.itl_by_position is None


def test_the_record_is_that_of_the_median_run() -> None:
    fast, middle, slow = (run_of([10.0 + seconds]) for seconds in (1.0, 2.0, 4.0))
    record = record_runs("m1", "x", [BenchRequest([1], 1)], [slow, fast, middle])
    assert record.output_tokens_per_s == pytest.approx(0.5)
    of_two = record_runs("m1", "x", [BenchRequest([1], 1)], [fast, slow])
    assert of_two.output_tokens_per_s == pytest.approx(0.25), "of two, the slower"
    assert record.output_tokens_per_s_repeats == pytest.approx([0.25, 1.0, 0.5])


def test_positions_count_from_the_prompt_and_are_binned() -> None:
    assert itl_by_position(8, [0.1, 0.2]) == [[9.0, 0.1], [10.0, 0.2]]
    binned = itl_by_position(0, [1.0] * 640)
    assert len(binned) == 64
    assert binned[0] == [5.5, 1.0]
    assert itl_by_position(8, []) == []


def test_only_a_point_of_a_sweep_has_a_variant() -> None:
    assert "variant" not in Record("m1", "single").to_json()
    assert Record("m1", "single", variant="output=64").to_json()["variant"] == "output=64"


def test_an_error_becomes_one_line() -> None:
    assert Record.failed("m1", "single", "first\n  second").error == "first second"
