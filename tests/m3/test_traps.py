"""Scheduling defects that published engines shipped, one test each. Two more stand elsewhere: the pool exhausted with
one live request (`test_m3.py`), and the request that ends on a block boundary (`tests/m2/test_greedy.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common import Engine, SamplingParams
from common.plan import Chunk, StepPlan
from common.request import Request
from common.sampler import mix
from common.watch.trace import StepTrace
from tests.engine_checks import (
    CHUNKED,
    CONTINUOUS,
    PAGED,
    SHARING,
    TOKEN_BYTES,
    Driver,
    assert_empty,
    check,
    exactly,
    prompts_of,
    serve,
)
from tests.fake_runner import EOS, TOKENS, without_model
from tests.helpers import greedy

Build = Callable[..., Engine]


def holders(engine: Engine) -> set[str]:
    return {id for region in engine.scheduler.cache.regions() for id in region.owners}


@pytest.mark.parametrize("swap_space", [0, 10**6])
@pytest.mark.parametrize("stage", CONTINUOUS)
def test_max_num_seqs_limits_the_requests_that_hold_memory(build: Build, stage: str, swap_space: int) -> None:
    """Must not limit a step only."""
    options = {"block_size": 4, "kv_cache_memory": 14 * 4 * TOKEN_BYTES, "swap_space": swap_space}
    engine = build(stage, max_num_seqs=3, max_model_len=40, **(options if stage in PAGED else {}))
    for prompt in prompts_of([9, 3, 14, 6, 6, 20, 2, 8]):
        engine.add_request(prompt, exactly(15))
    most = 0
    while engine.has_unfinished:
        engine.step()
        check(engine)
        assert holders(engine) == {request.id for request in engine.scheduler.running}
        most = max(most, len(holders(engine)))
    assert most == 3
    assert engine.metrics()["peak_running"] == 3


@pytest.mark.parametrize("stage", PAGED)
def test_admission_looks_at_the_whole_prompt(build: Build, stage: str) -> None:
    """8 blocks, 3 of them held. A prompt of 5 fits to the last slot, and its first token would evict a request. Must
    not look at a part of the prompt only."""
    engine = build(stage, block_size=4, kv_cache_memory=8 * 4 * TOKEN_BYTES, max_num_seqs=4, max_num_batched_tokens=4)
    engine.add_request(prompts_of([12])[0], exactly(4))
    engine.step()
    late = engine.add_request(prompts_of([20], seed=1)[0], exactly(4))
    waited = 0
    while engine.metrics()["waiting"]:
        waited += 1
        engine.step()
    assert waited == (6 if stage in CHUNKED else 4), "it starts when the first has ended"
    assert [request.id for request in engine.scheduler.running] == [late]
    while engine.has_unfinished:
        engine.step()
    assert engine.metrics()["preemptions"] == 0


@pytest.mark.parametrize("blocks", range(4, 14))
@pytest.mark.parametrize("stage", PAGED)
def test_no_request_is_preempted_in_the_step_after_an_admission(build: Build, stage: str, blocks: int) -> None:
    """Prompts that fill their blocks, so that all want a new one with their first token: each was kept a block. A
    request that was just admitted must not be preempted at once."""
    engine = build(stage, block_size=4, kv_cache_memory=blocks * 4 * TOKEN_BYTES)
    for prompt in prompts_of([4] * 6):
        engine.add_request(prompt, exactly(5))
    engine.add_request(prompts_of([4])[0], exactly(5, n=2, temperature=1.0))
    prefilled = False
    prefills = 0
    while engine.has_unfinished:
        plan = engine.scheduler.plan()
        assert plan is not None
        assert not (prefilled and plan.preempted)
        prefilled = any(chunk.kind != "decode" for chunk in plan.chunks)
        prefills += prefilled
        engine._deliver(engine.scheduler.update(plan, engine.runner.execute(plan)))
    assert prefills > 1


@pytest.mark.parametrize("stage", PAGED)
def test_samples_are_admitted_only_with_room_to_part(build: Build, stage: str) -> None:
    """3 of 7 blocks are held, one more is promised. A prompt of one block wants 3 more when its three samples part."""
    engine = build(stage, block_size=4, kv_cache_memory=7 * 4 * TOKEN_BYTES)
    engine.add_request(prompts_of([12])[0], exactly(4))
    engine.step()
    engine.add_request(prompts_of([4])[0], exactly(4, n=3, temperature=1.0))
    while engine.has_unfinished:
        engine.step()
        check(engine)
    assert engine.metrics()["preemptions"] == 0


@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
@pytest.mark.parametrize("stage", PAGED)
def test_a_preempted_request_at_the_head_never_blocks_the_others(build: Build, stage: str, swap_space: int) -> None:
    """Four small ones grow until the newest, a long prompt, gives way; it and all behind it finish all the same."""
    engine = build(stage, block_size=2, kv_cache_memory=24 * 2 * TOKEN_BYTES, swap_space=swap_space)
    preempted: list[str] = []
    ids = [engine.add_request(prompt, exactly(24)) for prompt in prompts_of([2, 2, 2, 2, 20, 1, 1])]
    ends: list[str] = []
    for _ in range(250):
        waiting = {request.id for request in engine.scheduler.waiting} | {r.id for r in engine.scheduler.swapped}
        ends += [output.request_id for output in engine.step() if output.finished]
        now = {request.id for request in engine.scheduler.waiting} | {r.id for r in engine.scheduler.swapped}
        preempted += now - waiting
    assert ids[4] in preempted and sorted(ends) == ids
    assert_empty(engine)


@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
@pytest.mark.parametrize("prompt", [7, 8, 9])
@pytest.mark.parametrize("stage", PAGED)
def test_prefilling_again_keeps_the_token_already_sampled(
    build: Build, stage: str, prompt: int, swap_space: int
) -> None:
    """Preempt by hand after each number of tokens: what comes is as if nothing had happened."""
    engine = build(stage, block_size=4, swap_space=swap_space)
    prompts = prompts_of([prompt, 5])
    expected = [greedy(engine.runner.model, token_ids, 9) for token_ids in prompts]
    for after in range(1, 9):
        trace = engine.trace = StepTrace()
        ids = [engine.add_request(token_ids, exactly(9)) for token_ids in prompts]
        final: dict[str, list[int]] = {}
        while engine.has_unfinished:
            final |= {output.request_id: output.token_ids for output in engine.step()}
            if len(trace.steps) == after:
                plan = StepPlan()
                engine.scheduler.preemption.preempt(engine.scheduler.running[0], plan)
                engine.runner._move_blocks(plan)
            check(engine)
        kinds = [chunk.kind for step in trace.steps for chunk in step.chunks if chunk.request_id == ids[0]]
        found_all = stage in SHARING and (prompt + after) % 4 == 1  # its own blocks are cached: one token is left
        again = [] if swap_space or found_all else ["recompute"]
        assert kinds == ["prefill"] + ["decode"] * (after - 1) + again + ["decode"] * (9 - after - len(again))
        assert [final[id] for id in ids] == expected


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_an_aborted_request_keeps_its_memory_until_its_step_is_back(build: Build, stage: str) -> None:
    """Planned, not yet updated: its memory stays its own until the step is back. Must not be freed while it is in
    flight."""
    engine = without_model(build(stage, max_num_seqs=2))
    driver = Driver(engine, ahead=True)
    [request] = driver.add([1, 2, 3], exactly(9))
    driver.step()
    driver.step()
    assert request.num_open_chunks == 1
    engine.abort(request.id)
    assert not request.finished and holders(engine) == {request.id}
    driver.drain()
    assert request.finish_reason == "abort" and holders(engine) == set()


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_an_abort_in_any_queue_leaves_nothing_behind(build: Build, stage: str) -> None:
    options = {"block_size": 4, "kv_cache_memory": 10 * 4 * TOKEN_BYTES, "swap_space": 3 * 4 * TOKEN_BYTES}
    for steps in range(20):
        engine = build(stage, max_num_seqs=4, **(options if stage in PAGED else {}))
        ids = [engine.add_request(prompt, exactly(14)) for prompt in prompts_of([3, 9, 6, 4, 8, 2])]
        for _ in range(steps):
            engine.step()
        for id in ids:
            engine.abort(id)
            check(engine)
        engine.step()
        assert_empty(engine)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_two_failed_steps_in_flight_leave_no_memory_behind(build: Build, stage: str) -> None:
    """The driver that plans ahead loses its device: one request had ended in the first step, and held on."""
    engine = without_model(build(stage))
    driver = Driver(engine, ahead=True)
    seed = next(seed for seed in range(999) if mix(seed, 2) % TOKENS == EOS)  # ends where it could not be foreseen
    [ended] = driver.add([1, 2], SamplingParams(max_tokens=9, seed=seed))
    driver.add([3], exactly(9))
    driver.step()
    driver.step()
    assert ended.finished and holders(engine) == {"request-0", "request-1"}
    engine.scheduler.drop(driver._in_flight.popleft())
    engine.runner.forget()
    engine.step()
    assert_empty(engine)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_a_finished_request_is_counted_and_delivered_once(build: Build, stage: str) -> None:
    engine = build(stage)
    serve(engine, prompts_of([4, 4]), [SamplingParams(max_tokens=1), exactly(3)])
    assert (engine.metrics()["finished"], engine.metrics()["aborted"], engine.metrics()["output_tokens"]) == (2, 0, 4)


@pytest.mark.parametrize(
    ("policy", "victims"),
    [("fcfs", [4, 3]), ("priority", [1, 3])],
    ids=["the newest first", "the lowest in priority first"],
)
@pytest.mark.parametrize("stage", PAGED)
def test_the_policy_decides_which_request_is_preempted(
    build: Build, stage: str, policy: str, victims: list[int]
) -> None:
    """Five prompts of a block each, in 9 blocks: they all start, and cannot all have a second block. Must not preempt
    the wrong one."""
    engine = build(stage, block_size=4, kv_cache_memory=9 * 4 * TOKEN_BYTES, scheduling_policy=policy)
    for prompt, priority in zip(prompts_of([3] * 5), (0, 2, 0, 1, 0), strict=True):
        engine.add_request(prompt, exactly(10), priority=priority, arrival_time=0.0)
    preempted: list[int] = []
    while len(preempted) < 2:
        plan = engine.scheduler.plan()
        assert plan is not None
        preempted += [request.number for request in plan.preempted]
        engine._deliver(engine.scheduler.update(plan, engine.runner.execute(plan)))
    assert preempted[:2] == victims


@pytest.mark.parametrize("stage", PAGED)
def test_samples_that_will_fork_keep_their_seats_when_others_swap_in(build: Build, stage: str) -> None:
    """Three decode; an urgent prompt with n=3 preempts some, and is still being computed when there is room again."""
    chunked = {"prefill_chunk_size": 1, "max_num_batched_tokens": 4} if stage in CHUNKED else {}
    memory = {"block_size": 4, "kv_cache_memory": 24 * 4 * TOKEN_BYTES, "swap_space": 60 * 4 * TOKEN_BYTES}
    engine = build(stage, max_model_len=64, max_num_seqs=4, scheduling_policy="priority", **chunked, **memory)
    for prompt in prompts_of([20, 20, 20]):
        engine.add_request(prompt, exactly(30), priority=5)
    while not engine.metrics()["swapped"]:
        engine.step()
    engine.add_request(prompts_of([16], seed=9)[0], exactly(4, n=3, temperature=1.0), priority=-5)
    while engine.has_unfinished:
        engine.step()
        check(engine)
        assert engine.scheduler.num_committed_seqs <= 4


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("stage", CONTINUOUS)
def test_a_failure_while_planning_leaves_nothing_behind(build: Build, stage: str, overlap: bool) -> None:
    """The plan is lost after chunks have been planned: nothing that it decided about memory may be trusted."""
    engine = build(stage, overlap=overlap, max_num_seqs=2)
    prompt = prompts_of([33])[0]
    for _ in range(3):
        engine.add_request(prompt, exactly(8))
    engine.step()
    chunk = type(engine.scheduler)._chunk

    def interrupted(request: Request, length: int) -> Chunk:
        chunk(engine.scheduler, request, length)
        raise KeyboardInterrupt

    engine.scheduler._chunk = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5]], exactly(1))
    del engine.scheduler._chunk
    while engine.has_unfinished:
        engine.step()
        check(engine)
    assert_empty(engine)
    assert engine.generate([prompt], exactly(8))[0].token_ids == greedy(engine.runner.model, prompt, 8)
