"""Schedulers and caches of all stages from m2 on, in any order of events, with the least memory: no model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import stages
from common import Engine, SamplingParams, UserError
from tests.depth import by_depth
from tests.engine_checks import BOOKKEEPING, CHUNKED, PAGED, TOKEN_BYTES, Driver
from tests.fake_runner import without_model
from tests.integrity import check_integrity

MAX_LEN = 24


class AnythingHappens(RuleBasedStateMachine):
    stage: str
    ahead: bool

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        pool=st.integers(1, 40),
        swap_blocks=st.sampled_from([0, 0, 4, 20]),
        max_num_seqs=st.sampled_from([1, 2, 3, 6, 6, 6]),
        budget=st.sampled_from([1, 8, 64]),
        chunk=st.sampled_from([1, 2, 3, 5, 16]),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def build(
        self, block_size: int, pool: int, swap_blocks: int, max_num_seqs: int, budget: int, chunk: int, policy: str
    ) -> None:
        """`pool`: tokens that the KV cache can hold, at the least one block or slot."""
        chunked = self.stage in CHUNKED
        paged = {"block_size": block_size, "swap_space": swap_blocks * block_size * TOKEN_BYTES}
        self.engine = stages.build(
            self.stage,
            model="random:tiny-llama",
            device="cpu",
            max_model_len=MAX_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(budget, max_num_seqs) if chunked else budget,
            scheduling_policy=policy,
            kv_cache_memory=max(pool, block_size if self.stage in PAGED else MAX_LEN) * TOKEN_BYTES,
            **(paged if self.stage in PAGED else {}),
            **({"prefill_chunk_size": chunk} if chunked else {}),
        )
        self.driver = Driver(without_model(self.engine), self.ahead)
        self.next_token = 1

    @rule(
        prompt=st.integers(1, 6) | st.integers(1, MAX_LEN - 1),
        output=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        count=st.integers(1, 4),
        ignore_eos=st.booleans(),
        priority=st.integers(-2, 2),
        arrival=st.sampled_from([0.0, 5.0, 10.0, 15.0, 40.0]),
    )
    def add(
        self, prompt: int, output: int, n: int, count: int, ignore_eos: bool, priority: int, arrival: float
    ) -> None:
        params = SamplingParams(max_tokens=output, n=n, ignore_eos=ignore_eos)
        blocks = -(-(prompt + output) // self.engine.config.block_size) + n - 1
        capacity = self.engine.scheduler.cache.usage().capacity
        refused = prompt + output > MAX_LEN or n > self.engine.config.max_num_seqs
        if self.stage in PAGED:
            refused |= blocks * self.engine.config.block_size > capacity
        for _ in range(count):
            self.next_token = self.next_token % 500 + 1
            with pytest.raises(UserError) if refused else nullcontext():
                self.driver.add([self.next_token] * prompt, params, priority, arrival)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: hasattr(self, "driver") and self.driver.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from([r.output_id for r in self.driver.requests])))

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "engine"):
            check_integrity(self.engine.scheduler.cache)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


def anything_happens(stage: str, ahead: bool, examples: int) -> None:
    machine = type("Machine", (AnythingHappens,), {"stage": stage, "ahead": ahead})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "one step ahead"])
@pytest.mark.parametrize("stage", BOOKKEEPING)
def test_no_block_is_lost_and_every_request_finishes(stage: str, ahead: bool) -> None:
    anything_happens(stage, ahead, by_depth(25, 600))


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "one step ahead"])
@pytest.mark.parametrize("swap_blocks", [0, 5, 99])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("stage", [stage for stage in BOOKKEEPING if stage in PAGED])
def test_constant_preemption_loses_no_block_and_picks_the_right_victim(
    build: Callable[..., Engine], stage: str, policy: str, swap_blocks: int, ahead: bool
) -> None:
    """Many growing requests in pools from the least that the longest one needs upwards."""
    preemptions = 0
    for seed in range(by_depth(6, 24)):
        random = Random(seed)
        size = random.choice([1, 2, 3])
        blocks = -(-MAX_LEN // size) + 1 + seed % 4
        engine = build(
            stage,
            max_model_len=MAX_LEN,
            max_num_seqs=8,
            scheduling_policy=policy,
            block_size=size,
            kv_cache_memory=blocks * size * TOKEN_BYTES,
            swap_space=swap_blocks * size * TOKEN_BYTES,
        )
        driver = Driver(without_model(engine), ahead)
        for number in range(10):
            prompt = random.randint(1, 5)
            params = SamplingParams(max_tokens=MAX_LEN - prompt, ignore_eos=random.random() < 0.5, n=1 + (number == 4))
            driver.add([number + 1] * prompt, params, random.randint(-2, 2), random.uniform(0, 30))
        for _ in range(5):
            preemptions += len(plan.preempted) if (plan := driver.step()) else 0
        engine.abort(driver.requests[seed % 5].output_id)
        driver.drain()
    assert preemptions > by_depth(5, 20)


@pytest.mark.parametrize(("stage", "same"), [("m4", "m3"), ("m7", "m6")])
def test_stages_without_bookkeeping_of_their_own_have_an_earlier_ones(
    build: Callable[..., Engine], stage: str, same: str
) -> None:
    """What the searches above show of one holds for the other."""
    one, other = build(stage).scheduler, build(same).scheduler
    assert type(one) is type(other) and type(one.cache) is type(other.cache)
    assert type(one.cache.pool) is type(other.cache.pool) and type(one.preemption) is type(other.preemption)
