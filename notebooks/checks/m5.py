"""The exercises of m5."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

from common import SamplingParams
from common.plan import StepPlan
from common.watch.trace import StepRecord, StepTrace
from notebooks.exercises import answered, check, expect_equal, outputs_of, tiny
from stages.m5_chunked_prefill import chunk_size as chunk_size_module
from stages.m5_chunked_prefill.chunk_size import AutoChunkSize


def _run(decoding: int, prompts: Sequence[int], budget: int, chunk: int) -> list[StepRecord]:
    """The steps of m5 in which prompts are computed: `decoding` requests have begun when these prompts arrive."""
    with tiny("m5", max_num_seqs=16, max_num_batched_tokens=budget, prefill_chunk_size=chunk) as engine:
        for number in range(decoding):
            engine.add_request([1 + number], *outputs_of([100]))
        if decoding:
            engine.step()
        engine.trace = StepTrace()
        left = {
            engine.add_request([7] * length, SamplingParams(max_tokens=1), request_id=f"prompt-{number}")
            for number, length in enumerate(prompts)
        }
        while left:
            left -= {output.request_id for output in engine.step() if output.finished}
        return list(engine.trace.steps)


@check
def plan_step(answer: Callable[[int, list[int], int, int], Sequence[int]]) -> str:
    """answer(decoding, left, budget, chunk) -> tokens of each prompt in the next step, held against m5 step by step."""
    compared = 0
    for decoding, prompts, budget, chunk in (
        (2, (50, 3, 30), 64, 16),
        (0, (50, 3, 30), 64, 16),
        (10, (40, 20), 24, 16),
        (1, (5, 5, 5, 5), 64, 16),
    ):
        left = list(prompts)
        for step in _run(decoding, prompts, budget, chunk):
            taken = {c.request_id: c.length for c in step.chunks if c.request_id.startswith("prompt-")}
            wanted = [taken.get(f"prompt-{number}", 0) for number in range(len(prompts)) if left[number]]
            open_prompts = [n for n in left if n]
            limits = f"the budget is {budget} and the chunk size {chunk}"
            case = f"{decoding} requests decode, the prompts have {open_prompts} tokens left, {limits}"
            got = list(answered(answer(decoding, open_prompts, budget, chunk), case))
            room = min(budget - decoding, chunk) if decoding else budget
            over = sum(got) > room
            hint = f"Yours are {sum(got)} prompt tokens, and there is room for {room}." if over else ""
            expect_equal(got, wanted, f"{case}, on m5", hint)
            left = [n - taken.get(f"prompt-{number}", 0) for number, n in enumerate(left)]
            compared += 1
    return f"Your plan is that of m5 in all {compared} steps: decodes first, then as much of the prompts as fits."


@check
def chunk_for(answer: Callable[[float, float, float], int]) -> str:
    """answer(target, decode_seconds, token_seconds) -> chunk size, held against `AutoChunkSize`."""
    for target, decode, token, what in (
        (0.050, 0.010, 0.00047, "a CPU"),
        (0.050, 0.030, 0.00047, "more requests that decode"),
        (0.050, 0.010, 0.00111, "a prompt that has become long, so that its tokens cost more"),
        (0.020, 0.030, 0.00047, "decodes that take longer than the target already"),
        (9.000, 0.010, 0.00011, "a target that every step meets"),
    ):
        times = f"target {target * 1e3:.0f} ms, a step that only decodes {decode * 1e3:.0f} ms"
        case = f"{what[0].upper()}{what[1:]}: {times}, a prompt token {token * 1e3:.2f} ms more"
        expect_equal(answer(target, decode, token), _auto(target, decode, token), case)
    return "That is what `prefill_chunk_size='auto'` does, with running averages of both times."


def _auto(target: float, decode: float, token: float) -> int:
    """What `AutoChunkSize` says when decodes took `decode` seconds, and 16 prompt tokens 16 x `token` more (mocked)."""
    chosen, ends = AutoChunkSize(target), (decode, 2 * decode + 16 * token)
    with patch.object(chunk_size_module.clock, "now", iter(ends).__next__):
        for begin, prompt_tokens in ((0.0, 0), (decode, 16)):
            decodes = [SimpleNamespace(length=1)]
            plan = SimpleNamespace(planned_at=begin, chunks=decodes, num_tokens=1 + prompt_tokens)
            chosen.observe(cast(StepPlan, plan))
    return chosen.tokens


@check
def read_again(answer: Callable[[int, int], int]) -> str:
    """answer(prompt, chunk) -> cached tokens that attention reads besides each chunk's own, held against m5's steps."""
    for prompt, chunk in ((64, 64), (64, 32), (64, 16), (70, 16), (10, 1)):
        steps = _run(1, [prompt], 64 + 1, chunk)
        starts = [c.start for step in steps for c in step.chunks if c.request_id == "prompt-0"]
        case = f"{prompt} tokens in chunks of {chunk}, which begin at {starts}"
        expect_equal(answer(prompt, chunk), sum(starts), case)
    few, many = answer(2048, 512), answer(2048, 32)
    read = f"reads {few:,} tokens of its own cache again in chunks of 512, and {many:,} in chunks of 32"
    return f"A prompt of 2,048 tokens {read}. Half the chunk is about twice the reading."
