"""Prompts in chunks, together with decodes: the schedule, and tokens that do not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common import Engine, UserError
from common.plan import StepPlan
from common.request import Request, RequestStatus
from common.scheduler import Scheduler
from tests.conftest import TINY
from tests.depth import DEEP
from tests.engine_checks import TOKEN_BYTES, Driver, check, exactly, prompts_of, serve, tokens
from tests.fake_runner import without_model
from tests.helpers import greedy

Build = Callable[..., Engine]
BLOCK = 4


def record_plans(engine: Engine) -> list[StepPlan]:
    """The engine's plans from now on; what decodes must be in every one of them, or have been preempted for it."""
    plans: list[StepPlan] = []
    scheduler: Scheduler = engine.scheduler
    plan_next = scheduler.plan

    def plan() -> StepPlan | None:
        decoding = [r for r in scheduler.running if r.num_tokens - r.num_computed_tokens == 1]
        made = plan_next()
        if made is not None:
            plans.append(made)
            served = {chunk.request.id for chunk in made.chunks} | {request.id for request in made.preempted}
            assert served >= {request.id for request in decoding}, "a decode stalled"
        return made

    scheduler.plan = plan  # type: ignore[method-assign]
    return plans


def shape(plan: StepPlan) -> list[tuple[str, int]]:
    return [(chunk.kind, chunk.length) for chunk in plan.chunks]


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_a_long_prompt_never_stalls_decodes(build: Build) -> None:
    """The schedule of the interview question, a quarter in size: 250 tokens in chunks of 64, with two decodes."""
    engine = build("m5", max_num_seqs=3, prefill_chunk_size=64)
    for prompt in prompts_of([5, 6]):
        engine.add_request(prompt, exactly(9))
    engine.step()
    plans = record_plans(engine)
    engine.add_request(prompts_of([250])[0], exactly(2))
    for _ in range(5):
        engine.step()
    decodes = [("decode", 1), ("decode", 1)]
    assert [shape(plan) for plan in plans] == [
        [*decodes, ("prefill", 64)],
        [*decodes, ("prefill", 64)],
        [*decodes, ("prefill", 64)],
        [*decodes, ("prefill", 58)],
        [*decodes, ("decode", 1)],
    ]


def test_prompts_take_the_whole_budget_while_no_request_decodes(build: Build) -> None:
    """The chunk size protects decodes; without any the whole budget goes to prompts. They must not go slowly then."""
    engine = build("m5", max_num_batched_tokens=250, prefill_chunk_size=32)
    plans = record_plans(engine)
    serve(engine, prompts_of([450]), exactly(1))
    assert [plan.num_tokens for plan in plans] == [250, 200]


def test_every_prompt_is_chunked(build: Build) -> None:
    """Two prompts share a step: the end of one and the beginning of the next. Must not chunk the first one only."""
    engine = build("m5", max_num_seqs=8, prefill_chunk_size=10)
    first = engine.add_request(prompts_of([3])[0], exactly(20))
    engine.step()
    plans = record_plans(engine)
    for prompt in prompts_of([16, 9, 25]):
        engine.add_request(prompt, exactly(1))
    for _ in range(5):
        engine.step()
    lengths = [[c.length for c in plan.chunks if c.request.id != first] for plan in plans]
    assert lengths == [[10], [6, 4], [5, 5], [10], [10]]


def test_a_step_never_exceeds_its_budget(build: Build) -> None:
    engine = build("m5", max_num_seqs=6, max_num_batched_tokens=12, prefill_chunk_size=9)
    plans = record_plans(engine)
    serve(engine, prompts_of([30, 2, 17, 1, 8, 8, 40, 3]), [exactly(n) for n in (5, 12, 1, 9, 30, 2, 4, 8)])
    for plan in plans:
        decodes = sum(chunk.kind == "decode" for chunk in plan.chunks)
        assert plan.num_tokens <= 12 and (not decodes or plan.num_tokens - decodes <= 9)
    assert any({"prefill", "decode"} <= {c.kind for c in plan.chunks} for plan in plans)


def test_admission_looks_at_the_whole_prompt(build: Build) -> None:
    """Both prompts would begin in 10 blocks, and neither could end: the second one waits for the first. Must not look
    at the first chunk only."""
    options = {"block_size": BLOCK, "kv_cache_memory": 10 * BLOCK * TOKEN_BYTES}
    engine = build("m5", max_num_seqs=4, max_num_batched_tokens=4, **options)
    plans = record_plans(engine)
    serve(engine, prompts_of([24, 24]), exactly(4))
    assert engine.metrics()["preemptions"] == 0
    owners = [{chunk.request.number for chunk in plan.chunks} for plan in plans]
    assert owners == [{0}] * 9 + [{1}] * 9


def test_siblings_of_a_prompt_under_way_are_counted(build: Build) -> None:
    """n = 3, and the prompt takes several steps: the two who will fork off have their places from the start."""
    engine = build("m5", max_num_seqs=4, max_num_batched_tokens=4)
    prompts = prompts_of([18, 2, 2])
    serve(engine, prompts, [exactly(6, n=3, temperature=1.0), exactly(3), exactly(3)])
    assert engine.metrics()["peak_running"] == 4


def test_an_urgent_request_preempts_one_that_started_first(build: Build) -> None:
    """The first one must not keep its memory from the more urgent one."""
    options = {"block_size": BLOCK, "kv_cache_memory": 6 * BLOCK * TOKEN_BYTES}
    driver = Driver(without_model(build("m5", scheduling_policy="priority", max_num_seqs=3, **options)))
    [first] = driver.add([1] * 7, exactly(12), priority=5)
    driver.step()
    [urgent] = driver.add([2] * 7, exactly(12), priority=0)
    driver.drain()
    assert first.num_preemptions > 0 and urgent.num_preemptions == 0


def test_a_newcomer_waits_until_a_swapped_request_is_back(build: Build) -> None:
    """Must not take the room that the swapped one waits for."""
    options = {"block_size": BLOCK, "kv_cache_memory": 6 * BLOCK * TOKEN_BYTES, "swap_space": 8 * BLOCK * TOKEN_BYTES}
    driver = Driver(without_model(build("m5", max_num_seqs=3, **options)))
    driver.add([1] * 7, exactly(14))
    [second] = driver.add([2] * 7, exactly(12))
    while second.status is not RequestStatus.SWAPPED:
        driver.step()
    [newcomer] = driver.add([3], exactly(2))
    assert driver.scheduler.cache.can_admit(newcomer)
    while second.status is RequestStatus.SWAPPED:
        assert newcomer.status is RequestStatus.WAITING
        driver.step()
    driver.drain()


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "chunk"),
    [
        (m, c)
        for i, m in enumerate(TINY)
        for j, c in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 16))
        if DEEP or i == j % len(TINY)
    ],
)
def test_chunks_change_no_token(build: Build, model: str, chunk: int) -> None:
    """Prompts that end at every offset around a block boundary, in chunks that begin at every one."""
    engine = build("m5", model=model, block_size=BLOCK, max_num_seqs=9, max_num_batched_tokens=9 + chunk,
                   prefill_chunk_size=chunk)  # fmt: skip
    prompts = prompts_of([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 1, 1, 2, 19, 31])
    outputs = serve(engine, prompts, exactly(7))
    assert tokens(outputs) == [greedy(engine.runner.model, prompt, 7) for prompt in prompts]


@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
def test_a_prompt_preempted_half_way_loses_no_token(build: Build, swap_space: int) -> None:
    """Memory for one long request: the late prompt, half computed, makes room for the decodes before it."""
    engine = build("m5", block_size=BLOCK, kv_cache_memory=16 * BLOCK * TOKEN_BYTES, max_num_seqs=3,
                   max_num_batched_tokens=3, prefill_chunk_size=1, swap_space=swap_space)  # fmt: skip
    prompts = prompts_of([4, 5, 30])
    under_way: list[int] = []
    preempt = engine.scheduler.preemption.preempt

    def recorded(victim: Request, plan: StepPlan) -> None:
        if 0 < victim.num_computed_tokens < victim.num_prompt_tokens:
            under_way.append(victim.num_computed_tokens)
        preempt(victim, plan)

    engine.scheduler.preemption.preempt = recorded
    outputs = serve(engine, prompts, [exactly(25), exactly(24), exactly(6)])
    assert under_way, "no prompt was preempted half way"
    assert engine.metrics()["preemptions"] and bool(engine.metrics()["swaps"]) == bool(swap_space)
    expected = [greedy(engine.runner.model, p, n) for p, n in zip(prompts, (25, 24, 6), strict=True)]
    assert tokens(outputs) == expected


@pytest.mark.parametrize("when", range(8))
def test_an_abort_half_way_through_a_prompt_leaks_nothing(build: Build, when: int) -> None:
    engine = build("m5", block_size=BLOCK, max_num_seqs=3, max_num_batched_tokens=5, prefill_chunk_size=3)
    prompts = prompts_of([3, 20, 11])
    outputs = serve(engine, prompts, exactly(6), aborts={when: [1]})
    for index in (0, 2):
        assert outputs[index].token_ids == greedy(engine.runner.model, prompts[index], 6)


def test_auto_goes_on_and_changes_no_token(build: Build) -> None:
    engine = build("m5", prefill_chunk_size="auto", target_itl=1e-4, max_num_seqs=4)
    prompts = prompts_of([40, 3, 60, 25, 8])
    outputs = serve(engine, prompts, exactly(9))
    assert tokens(outputs) == [greedy(engine.runner.model, prompt, 9) for prompt in prompts]
    assert engine.scheduler.chunk_size.tokens == 16, "no step takes 0.1 ms: the least that goes on"
    check(engine)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (
            "m5",
            {"prefill_chunk_size": 0},
            "unless it is auto, must be a whole number of at least 1, not 0",
        ),
        ("m5", {"prefill_chunk_size": "small"}, "prefill_chunk_size, unless it is auto, must be .*'small'"),
        ("m5", {"target_itl": 0}, "target_itl must be a number above 0, not"),
        ("m5", {"target_itl": float("nan")}, "target_itl must be a number above 0, not"),
        ("m5", {"max_num_batched_tokens": 8, "max_num_seqs": 9}, "max_num_batched_tokens=8 .*max_num_seqs=9"),
        ("m4", {"prefill_chunk_size": 64}, "'prefill_chunk_size'.* m5"),
    ],
)
def test_bad_options_are_refused_in_one_line(build: Build, stage: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(stage, **options)
    assert "\n" not in str(refusal.value)


def test_a_chunk_size_from_the_command_line_is_read_as_a_number(build: Build) -> None:
    """Must not stay text."""
    assert build("m5", prefill_chunk_size="64").scheduler.chunk_size.tokens == 64
