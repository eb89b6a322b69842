"""Planned a step ahead or step by step: the same tokens, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from common import Engine, SamplingParams
from common.text.tokenizer import Tokenizer
from common.watch.trace import StepTrace
from tests.depth import by_depth
from tests.engine_checks import (
    BOOKKEEPING,
    CONTINUOUS,
    PAGED,
    TOKEN_BYTES,
    assert_empty,
    exactly,
    prompts_of,
    serve,
    tokens,
)

Build = Callable[..., Engine]
TIGHT = {"block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES}


@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
@pytest.mark.parametrize("stage", [stage for stage in PAGED if stage in BOOKKEEPING])
def test_preemption_a_step_ahead_changes_no_token(build: Build, stage: str, swap_space: int) -> None:
    prompts, params = prompts_of((4, 1, 9, 7, 3, 8, 2, 12)), [exactly(n) for n in (25, 30, 20, 22, 29, 24, 31, 33)]
    expected = tokens(build(stage).generate(prompts, params))
    engine = build(stage, overlap=True, swap_space=swap_space, **TIGHT)
    assert tokens(serve(engine, prompts, params)) == expected
    assert engine.metrics()["preemptions"]


@pytest.mark.parametrize("stage", BOOKKEEPING)
def test_stops_and_aborts_a_step_ahead_change_no_token(build: Build, stage: str) -> None:
    """Random stop tokens, EOS, samples, penalties and aborts: what comes out does not show when it was planned. Stops
    must not come a step late."""
    for seed in range(by_depth(4, 12)):
        random = Random(seed)
        prompts = prompts_of([random.randint(1, 20) for _ in range(9)], seed)
        params = [
            SamplingParams(
                max_tokens=random.randint(1, 25),
                temperature=random.choice([0.0, 0.0, 1.0]),
                seed=number,
                n=random.choice([1, 1, 2]),
                repetition_penalty=random.choice([1.0, 1.0, 1.2]),
                stop_token_ids=[random.randrange(512) for _ in range(40)],
            )
            for number in range(9)
        ]
        aborts = {random.randint(0, 6): [random.randrange(9)] for _ in range(2)}
        aborted = {index for indices in aborts.values() for index in indices}
        both = [serve(build(stage, max_num_seqs=4, overlap=o), prompts, params, aborts) for o in (False, True)]
        for index, (one, other) in enumerate(zip(*both, strict=True)):
            for a, b in zip(one.outputs, other.outputs, strict=True):
                if index in aborted:
                    shared = min(len(a.token_ids), len(b.token_ids))
                    assert a.token_ids[:shared] == b.token_ids[:shared]
                else:
                    assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_a_token_computed_after_a_stop_is_neither_counted_nor_returned(build: Build, stage: str) -> None:
    free = build(stage).generate([[5, 6]], exactly(12))[0].token_ids
    stop = next(t for i, t in enumerate(free) if i >= 2 and t not in free[:i])
    engine = build(stage, overlap=True)
    (output,) = engine.generate([[5, 6]], exactly(12, stop_token_ids=[stop]))
    count = free.index(stop) + 1
    assert (output.token_ids, engine.metrics()["output_tokens"]) == (free[:count], count)
    assert engine.metrics()["steps"] == count + 1, "one step more was under way"
    assert_empty(engine)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_no_step_is_planned_after_requests_end_by_max_tokens(build: Build, stage: str) -> None:
    """A request that ends by max_tokens ends without a step too many."""
    steps = [build(stage, overlap=o, max_num_seqs=2) for o in (False, True)]
    for engine in steps:
        engine.generate(prompts_of((3, 4, 5)), exactly(7))
    assert steps[0].metrics()["steps"] == steps[1].metrics()["steps"]
    assert steps[0].metrics()["computed_tokens"] == steps[1].metrics()["computed_tokens"]


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_the_text_ends_before_a_stop_string_that_is_seen_a_step_late(
    build: Build, stage: str, tokenizer: Tokenizer
) -> None:
    engine = build(stage, overlap=True)
    engine.tokenizer = tokenizer
    (free,) = engine.generate([[5, 6]], exactly(12))
    stop = tokenizer.decode(free.token_ids[4:6])
    (output,) = engine.generate([[5, 6]], exactly(12, stop=stop))
    assert (output.finish_reason, output.text) == ("stop", free.text.split(stop)[0])


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_an_abandoned_stream_leaves_no_step_in_flight(build: Build, stage: str) -> None:
    engine = build(stage, overlap=True)
    other = engine.add_request([9, 9, 9], exactly(6))
    for output in engine.stream(prompts_of((3, 4)), exactly(20)):
        if len(output.token_ids) == 3:
            break
    assert not engine._planned
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [o.request_id for o in outputs if o.finished] == [other]
    assert sorted(len(o.token_ids) for o in outputs)[-1] == 6
    assert_empty(engine)


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_the_engine_is_a_step_ahead(build: Build, stage: str) -> None:
    """One step is in flight whenever `step` returns, none with a penalty that needs every token; the first two stages
    never overlap."""
    engine = build(stage, overlap=True)
    engine.add_request([1, 2], exactly(5))
    engine.step()
    assert len(engine._planned) == 1
    engine.add_request([1, 2], exactly(5, presence_penalty=1.0))
    depths = []
    while engine.has_unfinished:
        engine.step()
        depths.append(len(engine._planned))
    assert depths[-1] == 0 and depths.count(1) <= 2


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_steps_ahead_never_overlap_in_the_trace(build: Build, stage: str) -> None:
    engine = build(stage, overlap=True, max_num_seqs=4)
    trace = engine.trace = StepTrace()
    engine.generate(prompts_of((5, 9, 3, 1, 4, 7)), exactly(9))
    steps = list(trace.steps)
    assert all(a.begin + a.duration <= b.begin + 1e-9 for a, b in pairwise(steps))
    assert sum(step.duration for step in steps) == pytest.approx(engine.metrics()["busy_time_s"])
    assert all(step.host_time > 0 and step.device_busy is None for step in steps) and trace.idle_share is None
