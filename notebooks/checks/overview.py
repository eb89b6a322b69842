"""The exercises of the overview."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.record import Timeline
from notebooks.exercises import check, expect, expect_equal


@check
def latencies(answer: Callable[[float, Sequence[float]], tuple[float, float, float]]) -> str:
    """answer(arrival, token_times) -> (TTFT, mean time between tokens, end to end), in seconds."""
    for arrival, times in ((0.0, [1.0, 2.0, 3.0]), (10.0, [10.5, 10.6, 10.7, 11.5]), (2.0, [2.25, 4.25])):
        got = answer(arrival, times)
        expect(isinstance(got, tuple) and len(got) == 3, "Return three numbers: TTFT, time between tokens, end to end.")
        line = Timeline(arrival, list(times))
        case = f"Arrived at {arrival} s, tokens at {times}"
        expect_equal(got[0], line.ttft, f"{case}, TTFT in s", "When did it arrive?", ".3f")
        gaps = f"{len(times)} tokens have {len(times) - 1} gaps; the first token's wait is not one of them."
        expect_equal(got[1], sum(line.itl) / len(line.itl), f"{case}, s between tokens", gaps, ".3f")
        expect_equal(got[2], line.e2e, f"{case}, s end to end", form=".3f")
    return "The three numbers that a user feels."


@check
def bandwidth_limit(answer: Callable[[float, float, int], float]) -> str:
    """answer(weights_bytes, bytes_per_second, requests) -> most output tokens per second while decoding."""
    for weights, speed, requests in ((1e9, 10e9, 1), (1.2e9, 3e12, 1), (1e9, 10e9, 16)):
        case = f"{weights / 1e9:g} GB of weights, {speed / 1e9:,.0f} GB/s, tokens/s of {requests} requests together"
        hint = "A step reads the weights once, for all requests."
        expect_equal(answer(weights, speed, requests), requests * speed / weights, case, hint, ",.1f")
    return "Weights are read once a step, however many requests share it: that is what batching gains."


CURES = {  # each symptom with the stage that cures it, and how
    "every token costs more than the one before": ("m1", "keeps keys and values"),
    "short requests wait for a long one of their batch": ("m2", "lets requests join and leave at every step"),
    "memory is full of reserved, empty slots": ("m3", "gives out memory in blocks"),
    "attention writes a score matrix of length²": ("m4", "computes attention tile by tile"),
    "a long prompt stalls all decodes": ("m5", "cuts prompts to a budget of tokens for each step"),
    "the same system prompt is computed for every request": ("m6", "finds beginnings again that were computed before"),
    "reading the weights takes all the time": ("m7", "holds the weights in 4 bits"),
}


@check
def cures(answer: Mapping[str, str]) -> str:
    """answer: symptom -> stage."""
    does = dict(CURES.values())
    for symptom, (stage, _) in CURES.items():
        got = answer.get(symptom, "")
        expect(got in does, f"'{symptom}' has no stage yet.")
        expect(got == stage, f"'{symptom}': {got} {does[got]}, and this goes on.")
    return "Seven symptoms, seven ideas; the order of the stages is the order in which they hurt."
