"""n > 1: the prompt's blocks are held once, and the first divergent write copies. Blocks counted exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common import Engine, SamplingParams, UserError
from tests.engine_checks import PAGED, TOKEN_BYTES, assert_empty, check, exactly, prompts_of, serve

Build = Callable[..., Engine]
DIVERSE = {"temperature": 1.0, "seed": 3}


def blocks_used(engine: Engine) -> int:
    return engine.scheduler.cache.usage().reserved // engine.config.block_size


@pytest.mark.parametrize("stage", PAGED)
@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        pytest.param(8, [2, 6, 6, 6, 6, 10], id="full last block: nothing to copy, each takes a new one"),
        pytest.param(10, [3, 6, 6, 10, 10], id="partial last block: all but the last to write copy it"),
        pytest.param(11, [3, 6, 10, 10], id="partial last block, one slot free"),
        pytest.param(1, [1, 4, 4, 4, 8], id="one token"),
    ],
)
def test_blocks_of_the_prompt_are_held_once_for_all_samples(
    build: Build, stage: str, prompt: int, counts: list[int]
) -> None:
    """Blocks of 4, four samples: held after each step."""
    engine = build(stage, block_size=4)
    engine.add_request(prompts_of([prompt])[0], exactly(10, n=4, **DIVERSE))
    held: list[int] = []
    for _ in counts:
        engine.step()
        check(engine)
        held.append(blocks_used(engine))
    assert held == counts


@pytest.mark.parametrize("stage", PAGED)
@pytest.mark.parametrize(("prompt", "copies"), [(8, 0), (10, 3)])
def test_the_first_divergent_write_copies_the_partial_block_and_no_more(
    build: Build, stage: str, prompt: int, copies: int
) -> None:
    """Must not copy too much or too little."""
    engine = build(stage, block_size=4)
    engine.add_request(prompts_of([prompt])[0], exactly(10, n=4, **DIVERSE))
    counted: list[int] = []
    while engine.has_unfinished:
        plan = engine.scheduler.plan()
        assert plan is not None
        counted.append(len(plan.copies))
        assert len({source for source, _ in plan.copies}) <= 1, "one block is shared"
        engine._deliver(engine.scheduler.update(plan, engine.runner.execute(plan)))
        check(engine)
    assert counted == [0, copies] + [0] * 8
    assert_empty(engine)


@pytest.mark.parametrize("stage", PAGED)
def test_the_prompt_is_computed_once_for_all_samples(build: Build, stage: str) -> None:
    engine = build(stage)
    [output] = engine.generate(prompts_of([20]), exactly(5, n=4, **DIVERSE))
    assert engine.metrics()["computed_tokens"] == 20 + 4 * 4
    assert [len(sample.token_ids) for sample in output.outputs] == [5, 5, 5, 5]


@pytest.mark.parametrize("swap_blocks", [0, 3, 40])
@pytest.mark.parametrize("prompt", [7, 8, 9])
@pytest.mark.parametrize("stage", PAGED)
def test_preempted_samples_get_the_same_tokens(build: Build, stage: str, prompt: int, swap_blocks: int) -> None:
    prompts, params = prompts_of([prompt, 3, 12]), exactly(14, n=4, **DIVERSE)
    roomy = serve(build(stage, block_size=4), prompts, params)
    memory = {"kv_cache_memory": 11 * 4 * TOKEN_BYTES, "swap_space": swap_blocks * 4 * TOKEN_BYTES}
    engine = build(stage, block_size=4, **memory)
    tight = serve(engine, prompts, params)
    assert engine.metrics()["preemptions"] > 3 and bool(engine.metrics()["swaps"]) == bool(swap_blocks)  # type: ignore[operator]
    for one, other in zip(roomy, tight, strict=True):
        assert [sample.token_ids for sample in one.outputs] == [sample.token_ids for sample in other.outputs]


@pytest.mark.parametrize("steps", [0, 1, 2, 4], ids=["before the fork", "after the fork", "after the copy", "later"])
@pytest.mark.parametrize("stage", PAGED)
def test_an_aborted_group_leaves_no_sample_behind(build: Build, stage: str, steps: int) -> None:
    engine = build(stage, block_size=4)
    group = engine.add_request(prompts_of([6])[0], exactly(9, n=3, **DIVERSE))
    other = engine.add_request([1, 2], exactly(7))
    for _ in range(steps):
        engine.step()
    engine.abort(group)
    check(engine)
    assert not any(group in owner for region in engine.scheduler.cache.regions() for owner in region.owners)
    final = {}
    while engine.has_unfinished:
        final |= {output.request_id: output for output in engine.step()}
        check(engine)
    assert [sample.finish_reason for sample in final[group].outputs] == ["abort"] * 3
    assert [len(sample.token_ids) for sample in final[group].outputs] == [steps] * 3
    assert len(final[other].token_ids) == 7
    assert_empty(engine)


@pytest.mark.parametrize("stage", PAGED)
def test_a_group_that_can_never_run_together_is_refused(build: Build, stage: str) -> None:
    """The last block of each sample is its own: 4 blocks hold one sample of 16 tokens, not two."""
    engine = build(stage, block_size=4, kv_cache_memory=4 * 4 * TOKEN_BYTES)
    with pytest.raises(UserError, match=r"kv_cache_memory.*\bn$"):
        engine.add_request(prompts_of([12])[0], exactly(4, n=2, **DIVERSE))
    serve(engine, prompts_of([12, 12]), [exactly(4), exactly(1, n=1)])
    serve(engine, prompts_of([8]), exactly(4, n=2, **DIVERSE))


@pytest.mark.parametrize("stage", PAGED)
def test_a_group_starts_only_when_all_of_its_samples_may_run(build: Build, stage: str) -> None:
    engine = build(stage, max_num_seqs=4)
    for n in (3, 3, 1):
        engine.add_request([1, 2, 3], SamplingParams(n=n, max_tokens=3, temperature=1.0, ignore_eos=True))
    running: list[int] = []
    while engine.has_unfinished:
        engine.step()
        check(engine)
        running.append(len(engine.scheduler.running))
    assert running[:3] == [3, 3, 0] and max(running) == 4


def test_seed_0_draws_samples_that_differ(build: Build) -> None:
    """The hash of (0, -1) is 0: a second sample keyed by it would repeat the first."""
    params = SamplingParams(n=4, max_tokens=8, temperature=1.0, seed=0, ignore_eos=True)
    outputs = build("m3", max_num_seqs=4).generate([[1, 2, 3]], params)[0].outputs
    assert len({tuple(sample.token_ids) for sample in outputs}) == 4
