"""The step trace: what it says is what happened, and it stays small."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import stages
from benchmarks.files import write_json
from common import Engine, SamplingParams
from common.watch.trace import StepTrace
from tests.engine_checks import BOOKKEEPING, CONTINUOUS, PAGED, SHARING, TOKEN_BYTES, exactly, prompts_of

Build = Callable[..., Engine]
TIGHT = {"block_size": 4, "kv_cache_memory": 12 * 4 * TOKEN_BYTES}


def traced(build: Build, stage: str, trace: StepTrace, **options: int | str) -> Engine:
    engine = build(stage, max_num_seqs=6, **((TIGHT if stage in PAGED else {}) | options))
    engine.trace = trace
    engine.generate(prompts_of([5, 9, 3, 1, 4, 7, 6, 2]), exactly(30))
    return engine


@cache
def with_regions(stage: str) -> tuple[StepTrace, int]:
    """What several tests look at, and how many slots the cache has."""
    trace = StepTrace(regions=True)
    with traced(stages.build, stage, trace, model="random:tiny-llama", device="cpu") as engine:
        return trace, engine.scheduler.cache.usage().capacity


@pytest.mark.parametrize("stage", ["m0", "m1", *CONTINUOUS])
def test_the_trace_agrees_with_the_metrics(build: Build, stage: str) -> None:
    trace = StepTrace()
    metrics = traced(build, stage, trace).metrics()
    chunks = [chunk for step in trace.steps for chunk in step.chunks]
    assert [step.index for step in trace.steps] == list(range(metrics["steps"]))  # type: ignore[arg-type]
    assert sum(chunk.length for chunk in chunks if chunk.kind != "idle") == metrics["computed_tokens"]
    assert sum(step.duration for step in trace.steps) == pytest.approx(metrics["busy_time_s"])
    assert max(step.running for step in trace.steps) == metrics["peak_running"]
    assert max(step.kv_stored for step in trace.steps) * TOKEN_BYTES == metrics["kv_used_peak_bytes"]
    assert sum(len(step.preempted) for step in trace.steps) == metrics["preemptions"]
    assert all(a.begin + a.duration <= b.begin for a, b in pairwise(trace.steps))
    assert trace.arrivals.keys() == {chunk.request_id for chunk in chunks}
    assert all(step.regions is None for step in trace.steps)


@pytest.mark.parametrize("stage", [stage for stage in PAGED if stage in BOOKKEEPING])
@pytest.mark.parametrize("swap_space", [0, 6 * 4 * TOKEN_BYTES, 10**6], ids=["recompute", "both", "swap"])
def test_every_preemption_is_recorded(build: Build, stage: str, swap_space: int) -> None:
    """Each preemption is in the trace, and what the request does next says of which kind it was."""
    trace = StepTrace()
    metrics = traced(build, stage, trace, swap_space=swap_space).metrics()
    swapped: set[str] = set()
    recomputed: set[str] = set()
    begun: set[str] = set()
    seen: Counter[str] = Counter()
    for step in trace.steps:
        assert set(step.swapped_out) <= set(step.preempted)
        for chunk in step.chunks:
            assert chunk.request_id not in step.preempted
            if chunk.request_id in recomputed:
                if stage in SHARING:  # it may find some of its own blocks, or all
                    assert chunk.kind in ("recompute", "decode")
                else:
                    assert (chunk.kind, chunk.start) == ("recompute", 0)
                recomputed.discard(chunk.request_id)
            else:
                assert chunk.kind == ("decode" if chunk.request_id in begun else "prefill")
                begun.add(chunk.request_id)
                swapped.discard(chunk.request_id)
        for id in step.preempted:
            seen["swap" if id in step.swapped_out else "recompute"] += 1
            (swapped if id in step.swapped_out else recomputed).add(id)
        assert step.swapped == len(swapped)
    assert not swapped and not recomputed
    assert seen["swap"] == metrics["swaps"] and seen.total() == metrics["preemptions"]
    assert bool(seen["recompute"]) == (swap_space < 10**6) and bool(seen["swap"]) == (swap_space > 0)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_the_regions_agree_with_the_usage(stage: str) -> None:
    trace, capacity = with_regions(stage)
    for step in trace.steps:
        assert step.regions is not None
        assert sum(region.length for region in step.regions) == step.kv_reserved
        assert sum(region.stored for region in step.regions) == step.kv_stored
        spans = sorted((region.start, region.start + region.length) for region in step.regions)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "regions overlap"
        assert all(0 <= begin < end <= capacity for begin, end in spans)
        assert {id for region in step.regions for id in region.owners} >= {c.request_id for c in step.chunks}


@pytest.mark.parametrize("stage", PAGED)
def test_a_shared_block_has_all_its_owners_in_the_trace(build: Build, stage: str) -> None:
    engine = build(stage, block_size=4)
    engine.trace = StepTrace(regions=True)
    engine.generate(prompts_of([8]), exactly(2, n=3, temperature=1.0))
    first, second = engine.trace.steps
    assert first.regions is not None and second.regions is not None
    assert [len(region.owners) for region in first.regions] == [3, 3]
    assert sorted(len(region.owners) for region in second.regions) == [1, 1, 1, 3, 3]
    assert (first.running, len(second.chunks)) == (3, 3)
    assert [chunk.kind for chunk in first.chunks] == ["prefill", "fork", "fork"]


@pytest.mark.parametrize("stage", BOOKKEEPING)
def test_a_long_run_keeps_only_the_last_steps_in_the_trace(build: Build, stage: str) -> None:
    """Must not fill the memory."""
    engine = build(stage, max_num_seqs=4)
    trace = engine.trace = StepTrace(max_steps=10)
    for _ in range(60):
        engine.generate(prompts_of([2, 3, 4, 5]), SamplingParams(max_tokens=2))
        assert len(trace.steps) <= 10 and len(trace.arrivals) <= 4 * 10 + 4
    assert [step.index for step in trace.steps] == list(range(110, 120))
    kept = {chunk.request_id for step in trace.steps for chunk in step.chunks}
    assert kept <= trace.arrivals.keys(), "a step that is kept names a request without an arrival"
    assert trace.to_chrome()["traceEvents"]


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_the_json_file_is_what_was_recorded(stage: str, tmp_path: Path) -> None:
    trace, _ = with_regions(stage)
    path = tmp_path / "new" / "trace.json"
    write_json(path, trace.to_json(), indent=None)
    read = json.loads(path.read_text())
    assert read["schema"] == 1 and read["arrivals"] == trace.arrivals
    assert len(read["steps"]) == len(trace.steps)
    last, step = read["steps"][-1], trace.steps[-1]
    assert last["chunks"] == [asdict(chunk) for chunk in step.chunks]
    assert last["kv_reserved"] == step.kv_reserved and len(last["regions"]) == len(step.regions or ())
    assert [p.name for p in path.parent.iterdir()] == ["trace.json"], "a partial file is left"


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_the_chrome_trace_has_the_format_that_perfetto_opens(stage: str) -> None:
    """The Trace Event Format: complete events with times in microseconds, counters, and a name for every row."""
    trace, _ = with_regions(stage)
    events = json.loads(json.dumps(trace.to_chrome()))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {0: "steps"} | dict(enumerate(trace.arrivals, start=1))
    spans = [event for event in events if event["ph"] == "X"]
    counters = [event for event in events if event["ph"] == "C"]
    instants = [event for event in events if event["ph"] == "i"]
    assert len(spans) + len(counters) + len(names) + len(instants) == len(events)
    happened = {"preempted": "preempted", "swapped out": "swapped_out", "swapped in": "swapped_in"}
    for shown, kept in happened.items():
        assert [names[event["tid"]] for event in instants if event["name"] == shown] == [
            id for step in trace.steps for id in getattr(step, kept)
        ]
    assert all({"name", "pid", "tid", "ts", "dur"} <= event.keys() and event["dur"] >= 0 for event in spans)
    assert Counter(event["tid"] for event in spans)[0] == len(trace.steps)
    for id, row in ((id, row) for row, id in names.items() if row):
        kinds = [event["name"] for event in spans if event["tid"] == row]
        assert kinds == [c.kind for step in trace.steps for c in step.chunks if c.request_id == id]
    assert {event["name"] for event in counters} == {"requests", "KV token slots"}
    for event, step in zip((e for e in counters if e["name"] == "KV token slots"), trace.steps, strict=True):
        assert sum(event["args"].values()) == step.kv_reserved
        assert event["ts"] == pytest.approx(step.begin * 1e6)
