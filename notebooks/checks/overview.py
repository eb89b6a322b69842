"""The exercises of the overview."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.record import Timeline
from notebooks.exercises import answered, check, expect


@check
def latencies(answer: Callable[[float, Sequence[float]], tuple[float, float, float]]) -> str:
    """answer(arrival, token_times) -> (TTFT, mean time between tokens, end to end), in seconds."""
    for arrival, times in ((0.0, [1.0, 2.0, 3.0]), (10.0, [10.5, 10.6, 10.7, 11.5]), (2.0, [2.25, 4.25])):
        got = answer(arrival, times)
        expect(isinstance(got, tuple) and len(got) == 3, "Return three numbers: TTFT, time between tokens, end to end.")
        line = Timeline(arrival, list(times))
        case = f"Arrived at {arrival} s, tokens at {times}"
        right = abs(got[0] - line.ttft) < 1e-9
        expect(right, f"{case}: TTFT is {line.ttft:.3f} s; you say {got[0]:.3f}. When did it arrive?")
        gap = sum(line.itl) / len(line.itl)
        expect(
            abs(got[1] - gap) < 1e-9,
            f"{case}: you say {got[1]:.3f} s between tokens, and it is {gap:.3f}. {len(times)} tokens have "
            f"{len(times) - 1} gaps; the first token's wait is not one of them.",
        )
        expect(abs(got[2] - line.e2e) < 1e-9, f"{case}: end to end is {line.e2e:.3f} s; you say {got[2]:.3f}.")
    return "The three numbers that a user feels."


@check
def bandwidth_limit(answer: Callable[[float, float, int], float]) -> str:
    """answer(weights_bytes, bytes_per_second, requests) -> most output tokens per second while decoding."""
    for weights, speed, requests in ((1e9, 10e9, 1), (1.2e9, 3e12, 1), (1e9, 10e9, 16)):
        wanted = requests * speed / weights
        got = answered(answer(weights, speed, requests))
        expect(
            abs(got / wanted - 1) < 1e-6,
            f"{weights / 1e9:g} GB of weights, {speed / 1e9:,.0f} GB/s, {requests} requests together: you say "
            f"{got:,.1f} tokens/s, the limit is {wanted:,.1f}. A step reads the weights once, for all requests.",
        )
    return "Weights are read once a step, however many requests share it: that is what batching gains."


STAGES = {
    "every token costs more than the one before": "m1",
    "short requests wait for a long one of their batch": "m2",
    "memory is full of reserved, empty slots": "m3",
    "attention writes a score matrix of length²": "m4",
    "a long prompt stalls all decodes": "m5",
    "the same system prompt is computed for every request": "m6",
    "reading the weights takes all the time": "m7",
}
DOES = {
    "m1": "keeps keys and values",
    "m2": "lets requests join and leave at every step",
    "m3": "gives out memory in blocks",
    "m4": "computes attention tile by tile",
    "m5": "cuts prompts to a budget of tokens for each step",
    "m6": "finds beginnings again that were computed before",
    "m7": "holds the weights in 4 bits",
}


@check
def cures(answer: Mapping[str, str]) -> str:
    """answer: symptom -> stage."""
    for symptom, stage in STAGES.items():
        got = answer.get(symptom, "")
        expect(got in DOES, f"'{symptom}' has no stage yet.")
        expect(got == stage, f"'{symptom}': {got} {DOES[got]}, and this goes on.")
    return "Seven symptoms, seven ideas; the order of the stages is the order in which they hurt."
