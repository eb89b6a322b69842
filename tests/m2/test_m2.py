"""What is m2's own: slots, prefill and decode apart, the policies' order, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from common import Engine, SamplingParams, UserError
from common.plan import StepPlan
from common.request import Request
from stages.m2_continuous_batching.kv_cache import SlotCache
from tests.engine_checks import CONTINUOUS, TOKEN_BYTES, UNMIXED, exactly, prompts_of, serve, tokens
from tests.helpers import greedy

Build = Callable[..., Engine]
SLOT = 512 * TOKEN_BYTES
"""Bytes of a slot at the tiny models' own max_model_len."""


def record_plans(engine: Engine) -> list[StepPlan]:
    plans: list[StepPlan] = []
    plan_step = engine.scheduler.plan

    def watch() -> StepPlan | None:
        plan = plan_step()
        plans.extend([plan] if plan else [])
        return plan

    engine.scheduler.plan = watch  # type: ignore[method-assign]
    return plans


def kinds(plans: list[StepPlan]) -> list[list[str]]:
    return [[f"{chunk.kind} {chunk.request.number}" for chunk in plan.chunks] for plan in plans]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_slots_are_the_memory_allocated(build: Build) -> None:
    engine = build("m2", kv_cache_memory=3 * SLOT + SLOT // 2)
    tensors = [value for value in vars(engine.runner.attention).values() if isinstance(value, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == engine.metrics()["kv_pool_bytes"] == 3 * SLOT


def test_the_budget_decides_how_many_run(build: Build) -> None:
    for slots in (1, 3):
        engine = build("m2", kv_cache_memory=slots * SLOT)
        serve(engine, prompts_of([5] * 6), exactly(4))
        assert engine.metrics()["peak_running"] == slots


def test_reserved_is_a_whole_slot_and_used_is_what_was_stored(build: Build) -> None:
    engine = build("m2", max_model_len=100)
    for prompt in prompts_of([10, 20]):
        engine.add_request(prompt, exactly(8))
    for step in range(8):
        engine.step()
        metrics = engine.metrics()
        if step < 7:
            assert metrics["kv_reserved_bytes"] == 200 * TOKEN_BYTES
            assert metrics["kv_used_bytes"] == (30 + 2 * step) * TOKEN_BYTES
    assert (metrics["kv_reserved_bytes"], metrics["kv_used_bytes"]) == (0, 0)
    assert metrics["kv_used_peak_bytes"] == (30 + 2 * 7) * TOKEN_BYTES


def test_a_slot_is_free_as_soon_as_its_request_has_ended(build: Build) -> None:
    """Must not wait for the end of the batch, which is m1's waste: the third of three starts right after the first has
    ended, while the second runs on."""
    engine = build("m2", max_num_seqs=2)
    plans = record_plans(engine)
    serve(engine, prompts_of([3, 3, 3]), [exactly(1), exactly(4), exactly(2)])
    assert kinds(plans) == [
        ["prefill 0", "prefill 1"],
        ["prefill 2"],
        ["decode 1", "decode 2"],
        ["decode 1"],
        ["decode 1"],
    ]
    slots = {chunk.request.number: chunk.block_table[0] for plan in plans for chunk in plan.chunks}
    assert slots == {0: 0, 1: 1, 2: 0}


def test_what_a_slot_held_before_never_reaches_the_next_request(build: Build) -> None:
    """Large numbers, not NaN: what is masked still takes part, with weight 0."""
    engine = build("m2", max_num_seqs=4)
    engine.runner.attention._kv.fill_(1e4)
    prompts = prompts_of([9, 2, 14, 5, 3])
    outputs = serve(engine, prompts, [exactly(n) for n in (1, 6, 2, 9, 4)])
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(engine.runner.model, prompt, len(output.token_ids))


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", UNMIXED)
def test_prefill_and_decode_never_share_a_step(build: Build, stage: str) -> None:
    """m5 mixes them. Up to m4, newcomers make those who run wait: that is what m5 has to show."""
    engine = build(stage, max_num_seqs=3)
    plans = record_plans(engine)
    serve(engine, prompts_of([4] * 7), [exactly(n) for n in (5, 2, 9, 3, 1, 6, 2)])
    mixed = [{chunk.kind for chunk in plan.chunks} for plan in plans]
    assert all(len(step) == 1 for step in mixed) and {"prefill"} in mixed and {"decode"} in mixed
    for plan, later in pairwise(plans):
        if "decode" in {c.kind for c in plan.chunks} and "prefill" in {c.kind for c in later.chunks}:
            assert any(chunk.request.finished for chunk in plan.chunks), "a newcomer waited though it could start"


@pytest.mark.parametrize("stage", UNMIXED)
def test_a_prompt_over_the_token_budget_starts_in_a_step_of_its_own(build: Build, stage: str) -> None:
    """Must not wait for ever, nor bring other requests into its step."""
    engine = build(stage, max_num_batched_tokens=10)
    plans = record_plans(engine)
    serve(engine, prompts_of([4, 6, 1, 25, 3, 7]), exactly(1))
    assert [[chunk.length for chunk in plan.chunks] for plan in plans] == [[4, 6], [1], [25], [3, 7]]


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_a_late_arrival_joins_the_next_step(build: Build, stage: str) -> None:
    """Must not wait for the end of a batch."""
    engine = build(stage)
    engine.add_request([1, 2, 3], exactly(9))
    engine.step()
    late = engine.add_request([4, 5], exactly(2))
    assert late in [output.request_id for output in engine.step()]


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_priority_decides_who_starts(build: Build, stage: str) -> None:
    """Must not be ignored."""
    order: dict[str, list[str]] = {}
    for policy in ("fcfs", "priority"):
        engine = build(stage, max_num_seqs=1, scheduling_policy=policy)
        for name, priority, arrival in (("low", 1, 0.0), ("high", -1, 1.0), ("high too", -1, 2.0), ("starved", 1, -90)):
            engine.add_request([1, 2], exactly(2), request_id=name, priority=priority, arrival_time=arrival)
        outputs = [output for _ in range(8) for output in engine.step()]
        order[policy] = [output.request_id for output in outputs if output.finished]
    assert order["fcfs"] == ["low", "high", "high too", "starved"]
    assert order["priority"] == ["starved", "high", "high too", "low"]


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_no_padding_is_computed(build: Build, stage: str) -> None:
    engine = build(stage)
    serve(engine, prompts_of([3, 30, 7]), [exactly(n) for n in (4, 1, 9)])
    metrics = engine.metrics()
    assert metrics["padded_tokens"] == 0 and metrics["computed_tokens"] == 3 + 30 + 7 + 3 + 0 + 8


# -- n > 1 ------------------------------------------------------------------------------------------------------------


def test_samples_of_one_prompt_are_the_same_in_every_stage(build: Build) -> None:
    params = exactly(12, n=4, temperature=1.0, seed=7)
    prompts = prompts_of([20, 16, 1])
    stages = [stage for stage in CONTINUOUS if stage != "m7"]  # m7 has other weights: random ones are rounded there
    first, *others = [build(stage).generate(prompts, params) for stage in stages]
    for outputs in (first, *others):
        for a, b in zip(outputs, first, strict=True):
            assert [sample.token_ids for sample in a.outputs] == [sample.token_ids for sample in b.outputs]
            assert len({tuple(sample.token_ids) for sample in a.outputs}) == 4, "each sample draws for itself"


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("m2", {"kv_cache_memory": SLOT - 1}, "lower max_model_len or raise kv_cache_memory"),
        ("m2", {"block_size": 16}, "'block_size'.* m3"),
        ("m2", {"swap_space": 0}, "'swap_space'.* m3"),
        ("m1", {"scheduling_policy": "fcfs"}, "'scheduling_policy'.* m2"),
        ("m1", {"max_num_batched_tokens": 64}, "'max_num_batched_tokens'.* m2"),
        ("m2", {"scheduling_policy": "lifo"}, "scheduling_policy 'lifo'.*fcfs.*priority"),
        ("m2", {"max_num_batched_tokens": 0}, "max_num_batched_tokens.*at least 1"),
        ("m2", {"max_num_seqs": 0}, "max_num_seqs.*at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(build: Build, stage: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(stage, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_more_samples_than_can_run_are_refused(build: Build, stage: str) -> None:
    engine = build(stage, max_num_seqs=3)
    with pytest.raises(UserError, match=r"n=4 .*max_num_seqs=3"):
        engine.add_request([1, 2], SamplingParams(n=4, temperature=1.0))
    serve(engine, [[1, 2]], SamplingParams(n=3, temperature=1.0))


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_an_abandoned_stream_leaves_no_request_behind(build: Build, stage: str) -> None:
    engine = build(stage)
    stream = engine.stream(prompts_of([5, 6, 7]), exactly(20))
    for _ in range(5):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.metrics()["running"] == engine.metrics()["kv_reserved_bytes"] == 0
    assert tokens(engine.generate([[1, 2]], exactly(3))) == [greedy(engine.runner.model, [1, 2], 3)]


def test_a_request_may_fill_its_slot_to_the_last_token_and_no_further() -> None:
    cache = SlotCache(num_slots=1, slot_length=4)
    request = Request("a", [1], SamplingParams(), frozenset(), seed=0, arrival_time=0.0)
    assert cache.grow(request, 4) and not cache.grow(request, 5)
