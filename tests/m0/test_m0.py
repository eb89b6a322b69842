"""m0 against the plainest possible reference: one sequence, computed whole, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common import Engine, SamplingParams
from tests.conftest import TINY
from tests.helpers import greedy

Build = Callable[..., Engine]
RAGGED = [[5, 6, 7, 8, 9, 10, 11], [400], [17, 3], [100, 200, 300, 400, 500]]


@pytest.mark.parametrize("model", TINY)
def test_padding_changes_no_token(build: Build, model: str) -> None:
    engine = build("m0", model=model)
    outputs = engine.generate(RAGGED, [SamplingParams(max_tokens=n) for n in (4, 9, 1, 12)])
    for prompt, output in zip(RAGGED, outputs, strict=True):
        assert output.token_ids == greedy(engine.runner.model, prompt, len(output.token_ids))


def test_padding_share_is_counted_exactly(build: Build) -> None:
    """Prompts of 3 and 5 tokens that want 1 and 3: rows of 5, 6 and 7, of which 3 + 5, 6 and 7 are needed."""
    engine = build("m0", max_num_seqs=2)
    engine.generate([[1, 2, 3], [4, 5, 6, 7, 8]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)])
    metrics = engine.metrics()
    assert (metrics["computed_tokens"], metrics["padded_tokens"]) == (3 + 5 + 6 + 7, 2 + 6 + 7)
    assert metrics["padding_share"] == pytest.approx(15 / 36)
    assert metrics["kv_pool_bytes"] == 0 and metrics["kv_utilization"] is None


def test_no_padding_where_all_are_alike(build: Build) -> None:
    engine = build("m0")
    engine.generate([[1, 2], [3, 4]], SamplingParams(max_tokens=3))
    assert engine.metrics()["padding_share"] == 0.0


def test_everything_is_computed_again_in_every_step(build: Build) -> None:
    engine = build("m0")
    engine.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=3))
    assert engine.metrics()["computed_tokens"] == 4 + 5 + 6


@pytest.mark.parametrize("stage", ["m0", "m1"])
def test_the_next_batch_starts_only_when_the_whole_batch_has_ended(build: Build, stage: str) -> None:
    """Room for two. The first ends at once; the third must wait for the second all the same."""
    engine = build(stage, max_num_seqs=2)
    ids = [engine.add_request([n + 1], SamplingParams(max_tokens=m)) for n, m in enumerate((1, 4, 2, 2))]
    steps = []
    while engine.has_unfinished:
        steps.append([ids.index(o.request_id) for o in engine.step()])
    assert steps == [[0, 1], [1], [1], [1], [2, 3], [2, 3]]


@pytest.mark.parametrize("stage", ["m0", "m1"])
def test_finished_rows_are_carried_along_idle(build: Build, stage: str) -> None:
    engine = build(stage, max_num_seqs=3)
    for n, m in enumerate((1, 3, 2)):
        engine.add_request([n + 1, n + 2], SamplingParams(max_tokens=m))
    idle: list[list[bool]] = []
    plan_step = engine.scheduler.plan

    def watch() -> object:
        plan = plan_step()
        if plan is not None:
            idle.append([chunk.idle for chunk in plan.chunks])
            assert all(chunk.kind == "idle" and not chunk.samples for chunk in plan.chunks if chunk.idle)
        return plan

    engine.scheduler.plan = watch  # type: ignore[method-assign,assignment]
    while engine.has_unfinished:
        engine.step()
    assert idle == [[False, False, False], [True, False, False], [True, False, True]]


@pytest.mark.parametrize("stage", ["m0", "m1"])
def test_a_late_arrival_waits_for_the_next_batch(build: Build, stage: str) -> None:
    """There is room, but a static batch is closed once it runs. Must not join the one that has started."""
    engine = build(stage, max_num_seqs=4)
    ids = [engine.add_request([1, 2], SamplingParams(max_tokens=3))]
    steps = [[ids.index(o.request_id) for o in engine.step()]]
    ids.append(engine.add_request([3], SamplingParams(max_tokens=1)))
    while engine.has_unfinished:
        steps.append([ids.index(o.request_id) for o in engine.step()])
    assert steps == [[0], [0], [0], [1]]
