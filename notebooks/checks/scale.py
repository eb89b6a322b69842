"""The exercises of 97."""

from collections.abc import Callable, Sequence

import torch

from notebooks.exercises import check, expect, expect_equal, expect_tensor


@check
def mlp_part(answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]) -> str:
    """answer(x, up, down, rank, ranks): what one rank computes."""
    make = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=make) for shape in ((5, 8), (24, 8), (8, 24)))
    whole = torch.relu(x @ up.T) @ down.T
    for ranks in (1, 2, 3):
        parts = [answer(x, up, down, rank, ranks) for rank in range(ranks)]
        for part in parts:
            expect_tensor(part, (5, 8), "Each rank's part has the shape of the whole: parts are added up.")
        close = torch.allclose(torch.stack(parts).sum(0), whole, atol=1e-4)
        expect(close, f"The parts of {ranks} rank(s) do not add up to the whole. Which inputs of `down` has this rank?")
    if ranks > 1:
        alone = torch.allclose(parts[0], whole, atol=1e-4)
        expect(not alone, "Rank 0 computes everything: each rank has a part of the work.")
    return "Two products, one sum: that is all that ranks have to tell each other."


@check
def bytes_sent(answer: Callable[[int, int, int, int], float]) -> str:
    """answer(tokens, hidden, layers, ranks)."""
    cases = (
        (1, 4096, 32, 1, "one rank", "Alone there is nothing to send."),
        (1, 4096, 32, 2, "one token, two ranks", "Two all-reduces a layer; two bytes a number."),
        (64, 4096, 32, 8, "64 tokens, eight ranks", "Each sends every number twice, but for its own 1 / ranks."),
    )
    for tokens, hidden, layers, ranks, case, hint in cases:
        wanted = 2 * layers * 2 * (ranks - 1) / ranks * tokens * hidden * 2
        expect_equal(answer(tokens, hidden, layers, ranks), wanted, f"32 layers of 4,096, {case}, bytes", hint, ",.0f")
    return "Few bytes, many times: a decode step waits for latency, a prompt for bandwidth."


@check
def choose(answer: Callable[[Sequence[int], Sequence[int]], int]) -> str:
    """answer(cached, loads): a replica's number."""
    cases = (
        ([0, 512, 0], [2, 2, 2], 1, "one has the beginning, all are equally busy", "Go where it is cached."),
        ([0, 512, 256], [0, 40, 3], 2, "the one with most has 40 of 43 requests", "Is its load within the limit?"),
        ([0, 0, 0], [5, 2, 7], 1, "nobody has it", "Of equals, take the least loaded."),
        ([64, 64, 0], [9, 8, 0], 1, "two have the same", "Of equals, take the least loaded."),
    )
    for cached, loads, wanted, case, hint in cases:
        expect_equal(answer(cached, loads), wanted, f"cached {cached}, loads {loads} ({case}), replica", hint)
    return "Where it is cached, unless too many others are there."
