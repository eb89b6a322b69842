"""The exercises of m2."""

from collections.abc import Callable, Sequence

import torch

from common import SamplingParams
from common.plan import Chunk, StepPlan
from common.request import Request
from common.watch.trace import StepTrace
from notebooks.exercises import check, expect, expect_equal, outputs_of, tiny
from stages.m2_continuous_batching.batch import ragged_batch


@check
def steps(answer: Callable[[Sequence[int], int], int]) -> str:
    """answer(outputs, slots) -> decode steps that m2 takes for requests that all arrive at once."""
    for outputs, slots in (((5, 5), 2), ((9, 2, 2), 2), ((2, 9, 3, 4), 2), ((2, 2, 2, 8), 3), ((6, 3, 1, 4, 2), 2)):
        with tiny("m2", max_num_seqs=slots) as engine:
            engine.trace = StepTrace()
            engine.generate([[1, 2, 3]] * len(outputs), outputs_of(outputs))
            counted = sum(all(chunk.kind == "decode" for chunk in step.chunks) for step in engine.trace.steps)
        expect_equal(answer(outputs, slots), counted, f"Outputs of {list(outputs)} tokens in {slots} slots, on m2")
    return "That is what m2 does: a slot is taken again in the step after its request ends."


@check
def ragged(answer: Callable[[Sequence[int], Sequence[int]], tuple[list[int], list[int]]]) -> str:
    """answer(starts, lengths) -> (query_start_loc, positions) of sequences laid end to end."""
    for starts, lengths in (((0, 0), (3, 2)), ((0, 0, 0), (1, 4, 2)), ((7, 3), (1, 1)), ((0, 12, 5), (3, 1, 2))):
        chunks = [_chunk(start, length, n) for n, (start, length) in enumerate(zip(starts, lengths, strict=True))]
        batch = ragged_batch(StepPlan(chunks), torch.device("cpu"))
        got = answer(starts, lengths)
        expect(isinstance(got, tuple) and len(got) == 2, "Return two lists: query_start_loc, and positions.")
        case = f"Sequences that start at {list(starts)}, with {list(lengths)} new tokens"
        expect_equal([int(x) for x in got[0]], batch.query_start_loc.tolist(), f"{case}: query_start_loc")
        expect_equal([int(x) for x in got[1]], batch.positions.tolist(), f"{case}: positions")
    return "Those are the numbers that m2's `ragged_batch` makes."


def _chunk(start: int, length: int, row: int) -> Chunk:
    prompt = list(range(start + length))
    request = Request(f"r{row}", prompt, SamplingParams(), frozenset(), seed=0, arrival_time=0.0)
    return Chunk(request, start, length, block_table=(row,))


@check
def admit(answer: Callable[[Sequence[int], int, int], int]) -> str:
    """answer(prompts, slots, budget) -> how many waiting requests m2 starts in one prefill step."""
    cases = (
        ((10, 10, 10), 4, 100, "room for all"),
        ((10, 10, 10), 2, 100, "fewer slots than requests"),
        ((10, 10, 10), 4, 25, "a budget that two prompts fill"),
        ((30, 10), 4, 25, "a first prompt that is longer than the whole budget"),
        ((10, 30, 5), 4, 25, "a second prompt that does not fit, and a third that would"),
    )
    for prompts, slots, budget, what in cases:
        with tiny("m2", max_num_seqs=slots, max_num_batched_tokens=budget) as engine:
            for length in prompts:
                engine.add_request([1] * length, SamplingParams(max_tokens=2))
            plan = engine.scheduler.plan()
            started = len(plan.chunks) if plan else 0
        case = f"Prompts of {list(prompts)} tokens, {slots} slots, a budget of {budget} ({what})"
        expect_equal(answer(prompts, slots, budget), started, case)
    return "That is `ContinuousScheduler._prefill`: in order of arrival, and no prompt waits for ever."
