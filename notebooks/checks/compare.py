"""The exercises of 99."""

from collections.abc import Callable, Mapping

from notebooks.exercises import check, expect, expect_equal

H100 = (3.35e12, 989e12)  # bytes and dense bfloat16 operations a second
QWEN = (1_192e6, 1_192e6)  # Qwen3-0.6B: bytes of its weights in bfloat16, and operations a token (two a weight)
QWEN_KV = 114_688  # bytes of a token's K and V

PEOPLE = {  # each question with the first stage that answers it, and why
    "One user, long answers. The longer an answer gets, the slower it comes.":
        ("m1", "if the past is kept, a token costs the same at every position"),
    "Many users, all sorts of lengths. Short answers wait for long ones.":
        ("m2", "finished requests must leave, and the next ones join, at every step"),
    "Short chats, but room for 32,000 tokens must be kept for each. Memory is full with four of them.":
        ("m3", "memory has to be handed out as it is needed, not in advance"),
    "Contracts of 30,000 tokens. The score matrix of a prompt does not fit into memory.":
        ("m4", "only attention in tiles never writes that matrix"),
    "A chat service. Whenever one user pastes a long text, all other answers stop for a second.":
        ("m5", "the long prompt must be cut up, and its parts share steps with decodes"),
    "A thousand questions a minute, all under the same four pages of instructions.":
        ("m6", "those pages need to be computed once, and found again"),
    "One user on a laptop. Each token waits for the weights to be read; small errors are fine.":
        ("m7", "only fewer bytes shorten that wait"),
}  # fmt: skip


@check
def most_tokens_per_s(answer: Callable[[int, float, float, float, float, float], float]) -> str:
    """answer(rows, weights_bytes, kv_bytes_per_row, flops_per_token, bandwidth, flops_per_s) -> tokens a second."""
    cases = (
        (1, 0, "one request, nothing in its cache yet", "Reading and computing go on at the same time."),
        (64, 1000, "64 requests with 1,000 tokens each", "A step also reads the K and V of the other 63."),
        (1024, 0, "1,024 requests, nothing in their caches yet", "How long does the arithmetic of 1,024 rows take?"),
        (256, 600, "256 requests with 600 tokens each", "Is the time the sum of reading and computing, or the longer?"),
    )
    (weights, flops), (bandwidth, flops_per_s) = QWEN, H100
    for rows, kept, case, hint in cases:
        reading = (weights + rows * kept * QWEN_KV) / bandwidth
        wanted = rows / max(reading, rows * flops / flops_per_s)
        got = answer(rows, weights, kept * QWEN_KV, flops, bandwidth, flops_per_s)
        expect_equal(got, wanted, f"Qwen3-0.6B on an H100, {case}, tokens/s", hint, ",.0f")
    first, many = (answer(rows, weights, kept * QWEN_KV, flops, *H100) for rows, kept in ((1, 0), (256, 600)))
    return f"Qwen3-0.6B on an H100: {first:,.0f} tokens/s alone at most, {many:,.0f} with 256 requests of 600 tokens."


@check
def stage_for(answer: Mapping[str, str]) -> str:
    """answer: the first stage for each of `PEOPLE`."""
    expect(set(answer) == set(PEOPLE), "Leave the questions as they are, and change the stages behind them.")
    right = sum(answer[question] == stage for question, (stage, _) in PEOPLE.items())
    for question, (stage, why) in PEOPLE.items():
        said = str(answer[question])
        expect(said in {f"m{n}" for n in range(8)}, f"{said!r} is no stage: choose from m0 to m7.")
        but = "has what it takes, but an earlier stage has it already" if said > stage else "has not what it takes"
        expect(said == stage, f"{right} of {len(PEOPLE)} are right. '{question}' {said} {but}: {why}.")
    return "Each stage was made for one of them."


@check
def speedup(answer: Callable[[float, float], float]) -> str:
    """answer(share, factor) -> how many times as fast the whole is, held against adding up times."""
    expect_equal(answer(0.0, 4.0), 1, "No share at all, four times as fast")
    for share, factor in ((0.5, 2.0), (0.9, 1e9), (0.31, 3.0)):
        fast, slow = 100 * share, 100 * (1 - share)
        now = fast / factor + slow
        case = f"A step of 100 ms, {fast:.0f} ms of it {factor:,.0f} times as fast; speedup over all"
        hint = f"It takes {now:.1f} ms now, and 100 / {now:.1f} is {100 / now:.2f}."
        expect_equal(answer(share, factor), 100 / now, case, hint, ",.2f")
    return f"With 70 % of a step four times as fast, the step is {answer(0.7, 4):.2f} times as fast; 3.33 is the limit."
