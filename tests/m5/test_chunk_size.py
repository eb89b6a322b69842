"""`auto`: the chunk size follows what steps are measured to take. The clock is fake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common import EngineConfig, SamplingParams
from common.plan import Chunk, StepPlan
from common.request import Request
from common.watch.clock import VirtualClock, using
from stages.m5_chunked_prefill import chunk_size
from stages.m5_chunked_prefill.chunk_size import AutoChunkSize, ChunkSize


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    virtual = VirtualClock(100.0)
    with using(virtual):
        yield virtual


def step(clock: VirtualClock, size: ChunkSize, seconds: float, prompt_tokens: int, decodes: int = 8) -> None:
    request = Request("r", [1] * 10_000, SamplingParams(), frozenset(), 0, 0.0)
    chunks = [Chunk(request, 10_000, 1) for _ in range(decodes)]
    if prompt_tokens:
        chunks.append(Chunk(request, 0, prompt_tokens, samples=False))
    plan = StepPlan(chunks, planned_at=clock.time)
    clock.time += seconds
    size.observe(plan)


def drive(clock: VirtualClock, size: AutoChunkSize, decode: float, token: float, steps: int = 40) -> None:
    """A machine on which a step takes `decode` seconds and `token` more for each prompt token."""
    for index in range(steps):
        tokens = size.tokens if index % 2 else 0
        step(clock, size, decode + token * tokens, tokens)


def test_the_target_is_met_on_a_steady_machine(clock: VirtualClock) -> None:
    size = AutoChunkSize(target=0.050)
    drive(clock, size, decode=0.010, token=0.0001)
    assert size.tokens in (384, 400)  # (50 - 10) ms / 0.1 ms = 400, rounded down to a unit
    drive(clock, size, decode=0.010, token=0.0004)
    assert size.tokens in (96, 112)  # 40 ms / 0.4 ms = 100, within one unit


def test_prompts_go_on_where_decodes_alone_miss_the_target(clock: VirtualClock) -> None:
    size = AutoChunkSize(target=0.005)
    drive(clock, size, decode=0.010, token=0.0001)
    assert size.tokens == AutoChunkSize.UNIT


def test_a_fast_machine_gets_the_largest_chunk_and_no_more(clock: VirtualClock) -> None:
    """Must not be endless."""
    size = AutoChunkSize(target=10.0)
    drive(clock, size, decode=0.001, token=1e-9)
    assert size.tokens == AutoChunkSize.MOST


def test_steps_planned_ahead_are_counted_once(clock: VirtualClock) -> None:
    """Planned while the one before ran: the step itself began when that one ended."""
    size = AutoChunkSize(target=0.050)
    request = Request("r", [1] * 4, SamplingParams(), frozenset(), 0, 0.0)
    for _ in range(20):
        first, second = (StepPlan([Chunk(request, 3, 1)], planned_at=clock.time) for _ in range(2))
        clock.time += 0.010
        size.observe(first)
        clock.time += 0.010
        size.observe(second)
    step(clock, size, 0.010 + 0.0001 * 256, 256)
    assert size.tokens in (384, 400)


def test_one_slow_step_counts_for_a_quarter(clock: VirtualClock) -> None:
    """A quarter of the newest step counts: one that takes three times as long costs a third of the size. It must not
    change everything."""
    size = AutoChunkSize(target=0.050)
    drive(clock, size, decode=0.010, token=0.0001, steps=60)
    step(clock, size, 0.010 + 0.0003 * 400, 400)
    assert size.tokens == 256, "40 ms / (0.75 * 0.1 + 0.25 * 0.3) ms = 267"


def test_prompts_without_decodes_beside_them_teach_the_same_cost(clock: VirtualClock) -> None:
    """A decode takes 20 ms, a prompt alone 0.098 ms a token: no decode is taken off, none grows cheaper."""
    size = AutoChunkSize(target=0.060)
    step(clock, size, 0.020, 0)
    for _ in range(30):
        step(clock, size, 0.000098 * 100, 100, decodes=0)
    assert size.tokens == 400, "(60 - 20) ms / 0.098 ms = 408"


def test_a_prompt_chunk_of_two_tokens_never_counts_as_a_decode(clock: VirtualClock) -> None:
    """Sixteen chunks of two tokens are 32 tokens of prompts, and no request decodes with them."""
    size = AutoChunkSize(target=0.050)
    step(clock, size, 0.010, 0)
    request = Request("r", [1] * 10, SamplingParams(), frozenset(), 0, 0.0)
    plan = StepPlan([Chunk(request, 0, 2, samples=False) for _ in range(16)], planned_at=clock.time)
    clock.time += 0.039
    size.observe(plan)
    assert size.tokens == 32, "(50 - 10) ms / (39 / 32) ms = 32.8"


def test_options_choose_the_size() -> None:
    choose = chunk_size.choose_chunk_size
    assert choose(EngineConfig(model="random:tiny-llama", device="cpu")).tokens == 256
    assert choose(EngineConfig(model="random:tiny-llama", device="cpu", prefill_chunk_size=7)).tokens == 7
    auto = choose(EngineConfig(model="random:tiny-llama", device="cpu", prefill_chunk_size="auto", target_itl=0.02))
    assert isinstance(auto, AutoChunkSize) and auto.target == 0.02


@pytest.mark.parametrize("first", [16, 256, 4096])
def test_the_size_is_learned_while_every_step_has_prompts(clock: VirtualClock, first: int) -> None:
    """No step has decodes alone: the size still becomes that with which a step takes the target."""
    size = AutoChunkSize(target=0.050)
    size.tokens = first
    for _ in range(60):
        step(clock, size, 0.010 + 0.0001 * size.tokens, size.tokens)
    assert size.tokens in (384, 400)


def test_prompts_alone_teach_the_cost_of_a_token(clock: VirtualClock) -> None:
    """Before anybody decodes: half a second for 1,000 tokens, so 100 in 50 ms."""
    size = AutoChunkSize(target=0.050)
    step(clock, size, 0.500, 1000, decodes=0)
    assert size.tokens == 96
    step(clock, size, 0.500, 1000, decodes=0)
    step(clock, size, 0.006, 0)
    assert size.tokens == 80, "(50 - 6) ms / 0.5 ms = 88"


def test_prompts_grow_again_after_decodes_that_were_slow_once(clock: VirtualClock) -> None:
    """Many decoded, alone, in more than the target; few go on, with prompts in every step."""
    size = AutoChunkSize(target=0.050)
    for _ in range(10):
        step(clock, size, 0.080, 0, decodes=64)
        step(clock, size, 0.080 + 0.0001 * 256, 256, decodes=64)
    assert size.tokens == AutoChunkSize.UNIT
    for _ in range(80):
        step(clock, size, 0.010 + 0.0001 * size.tokens, size.tokens)
        assert size.tokens <= 500, "a step of more than the target and its decodes"
    assert size.tokens in (384, 400)


def test_a_few_tokens_of_prompt_change_nothing(clock: VirtualClock) -> None:
    """With fewer tokens than a unit, noise is all that there is to measure. A few must not be taken for slow."""
    size = AutoChunkSize(target=0.050)
    drive(clock, size, decode=0.010, token=0.0001)
    before = size.tokens
    for tokens in (2, 8, 15):
        step(clock, size, 0.030, tokens)
    assert size.tokens == before
    step(clock, size, 0.030, 16)
    assert size.tokens < before / 2


def test_the_size_stays_until_a_prompt_is_measured_and_a_fixed_one_always(clock: VirtualClock) -> None:
    size = AutoChunkSize(target=0.050)
    step(clock, size, 0.010, 0)
    assert size.tokens == AutoChunkSize.FIRST
    fixed = ChunkSize(100)
    step(clock, fixed, 5.0, 50)
    assert fixed.tokens == 100
