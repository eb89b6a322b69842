"""The pictures of `make stage3 trace`: drawn from a real run of a tiny model."""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import benchmarks.trace
from benchmarks.plots.timeline import KINDS, states
from benchmarks.schedule import _step_times, record_schedule  # pyright: ignore[reportPrivateUsage]
from benchmarks.trace import SHARED, record, trace

TINY = ("random:tiny-llama", "cpu", "float32")
recorded = cache(record)
"""A stage does the same for every picture."""


@pytest.fixture(autouse=True)
def each_stage_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.trace, "record", recorded)


def test_writes_both_stages_traces_and_pictures_that_are_not_blank(tmp_path: Path) -> None:
    written = trace("stage3", *TINY, tmp_path)
    assert [p.name for p in written] == [
        "m2_trace.json",
        "m2_trace.chrome.json",
        "m3_trace.json",
        "m3_trace.chrome.json",
        "m3_timeline.png",
        "m3_memory.png",
    ]
    assert json.loads(written[2].read_text())["steps"]
    for picture in written[-2:]:
        assert np.std(matplotlib.image.imread(picture)) > 0.05


def test_the_first_stage_has_no_one_before_it_and_no_memory_to_draw(tmp_path: Path) -> None:
    assert [p.name for p in trace("m0", *TINY, tmp_path)] == [
        "m0_trace.json",
        "m0_trace.chrome.json",
        "m0_timeline.png",
    ]


@pytest.mark.parametrize("stage", ["m4", "m5", "m6", "m7"])
def test_a_model_shorter_than_the_prompts_of_the_picture_gets_its_picture(stage: str, tmp_path: Path) -> None:
    names = [path.name for path in trace(stage, *TINY, tmp_path)]
    assert names[-1] == ("m6_tree.png" if stage == "m6" else f"{stage}_schedule.png")
    before = f"m{int(stage[1]) - 1}_trace.json"
    assert (before in names) == (stage in ("m5", "m6")), "a picture of the same steps twice says nothing"


def test_from_m6_on_the_prompts_begin_alike_and_only_m6_shares_their_blocks() -> None:
    shared: list[int] = []
    for stage in ("m5", "m6"):
        steps = recorded(stage, *TINY, None, SHARED).trace.steps
        shared.append(max(sum(len(one.owners) > 1 for one in step.regions or ()) for step in steps))
    assert shared == [0, SHARED // 16]
    lengths = [len(recorded(stage, *TINY, None, SHARED).trace.steps) for stage in ("m5", "m6")]
    assert lengths[1] < lengths[0]


def test_the_finding_of_a_stage_with_the_same_steps_is_what_they_take() -> None:
    traces = {stage: record_schedule(stage, *TINY, 64) for stage in ("m6", "m7")}
    said = _step_times(traces, "decode")
    times = [
        statistics.median(s.duration for s in list(t.steps)[1:] if all(c.kind == "decode" for c in s.chunks))
        for t in traces.values()
    ]
    assert said.endswith(f"takes, in one run: {1e3 * times[0]:.0f} ms in m6, {1e3 * times[1]:.0f} ms in m7")


def test_the_schedule_of_a_short_model_has_the_same_shape() -> None:
    """Half of the long prompt in half the chunks: as many steps."""
    steps = record_schedule("m5", *TINY).steps
    assert [c.length for step in steps for c in step.chunks if c.kind == "prefill"][2:] == [128, 128, 128, 116]


@pytest.mark.parametrize("stage", ["m1", "m2", "m3"])
def test_the_timeline_shows_every_computed_token_once(stage: str) -> None:
    run = recorded(stage, *TINY)
    grid = states(run)
    codes = list(KINDS)
    decodes = sum(chunk.kind == "decode" for step in run.trace.steps for chunk in step.chunks)
    assert (grid == codes.index("decode")).sum() == decodes
    assert (grid == codes.index("prefill")).sum() == 16
    assert ((grid == codes.index("idle")).any()) == (stage == "m1")


def test_little_memory_makes_m3_swap_and_recompute() -> None:
    grid = states(recorded("m3", *TINY))
    for kind in ("swapped", "preempted", "recompute"):
        assert (grid == list(KINDS).index(kind)).any(), kind
