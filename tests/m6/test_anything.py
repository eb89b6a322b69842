"""Sharing, eviction, swaps, forks, aborts, resets and failed steps in any order, with little memory: no model.

The fake runner compares every token that a step reads with the one that belongs there, so that a block shared by
mistake, evicted under an owner, or replaced too early is noticed.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import stages
from common import SamplingParams, UserError
from stages.m6_prefix_caching.hash_index import HashIndex, chain_hash
from tests.depth import by_depth
from tests.engine_checks import TOKEN_BYTES, Driver, check
from tests.fake_runner import without_model

MAX_LEN = 28


def three_keys(parent_key: int, tokens: tuple[int, ...]) -> int:
    return chain_hash(parent_key, tokens) % 3


class AnythingHappens(RuleBasedStateMachine):
    ahead: bool

    @initialize(
        index=st.sampled_from(["hash", "radix", "weak"]),
        block_size=st.sampled_from([1, 2, 3, 4]),
        pool=st.integers(8, 48),
        swap_blocks=st.sampled_from([0, 0, 4, 20]),
        chunk=st.sampled_from([1, 2, 5, 64]),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def build(self, index: str, block_size: int, pool: int, swap_blocks: int, chunk: int, policy: str) -> None:
        self.engine = stages.build(
            "m6",
            model="random:tiny-llama",
            device="cpu",
            max_model_len=MAX_LEN,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            prefill_chunk_size=chunk,
            scheduling_policy=policy,
            block_size=block_size,
            kv_cache_memory=pool * TOKEN_BYTES,
            swap_space=swap_blocks * block_size * TOKEN_BYTES,
            prefix_index="radix" if index == "radix" else "hash",
        )
        if index == "weak":
            self.engine.scheduler.cache.index = HashIndex(three_keys)
        self.driver = Driver(without_model(self.engine), self.ahead)
        self.past = [[1]]

    @rule(
        data=st.data(),
        shared=st.integers(0, 20),
        tail=st.lists(st.integers(1, 2), max_size=6),
        output=st.integers(1, 10),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        count=st.integers(1, 3),
        priority=st.integers(-2, 2),
        salt=st.sampled_from([None, None, None, "a", "b"]),
    )
    def add(
        self,
        data: st.DataObject,
        shared: int,
        tail: list[int],
        output: int,
        n: int,
        count: int,
        priority: int,
        salt: str | None,
    ) -> None:
        """Prompts begin as an earlier one with its answer, and go on with tokens of an alphabet of two."""
        prompt = data.draw(st.sampled_from(self.past))[:shared] + tail
        params = SamplingParams(max_tokens=output, n=n, ignore_eos=True)
        for _ in range(count):
            try:
                id = self.engine.add_request(prompt, params, priority=priority, arrival_time=0.0, cache_salt=salt)
            except UserError:
                return
            samples = self.engine._requests[id]
            self.driver.requests += samples
            self.past = [*self.past[-5:], samples[0].token_ids]

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from([r.output_id for r in self.driver.requests])))
        check(self.engine)

    @rule()
    def reset(self) -> None:
        self.engine.reset_prefix_cache()
        check(self.engine)

    @rule(one_in_three=st.integers(0, 2))
    def fail(self, one_in_three: int) -> None:
        """A step fails half way: what it should have written is anything."""
        plan = self.engine.scheduler.plan() if one_in_three == 0 else None
        if plan is None:
            return
        in_flight, runner = self.driver._in_flight, self.engine.runner
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.end):
                block, offset = runner._slot(chunk, position)
                runner._blocks[block][offset] = -1
        runner.forget()
        for failed in (*in_flight, plan):
            self.engine.scheduler.drop(failed)
        in_flight.clear()
        self.engine._deliver(self.engine.scheduler.take_ended())
        check(self.engine)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()
            held = [entry.block for entry in self.engine.scheduler.cache._entries.values()]
            assert sorted(held) == sorted(self.engine.scheduler.cache.pool.reusable), "what is left is free, and found"


def anything_happens(ahead: bool, examples: int) -> None:
    machine = type("Machine", (AnythingHappens,), {"ahead": ahead})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "one step ahead"])
def test_no_request_reads_a_block_that_is_not_its_own(ahead: bool) -> None:
    anything_happens(ahead, by_depth(25, 600))
