"""The exercises of m0."""

from collections.abc import Callable, Sequence

import torch

from notebooks.exercises import check, expect, expect_equal, expect_tensor, outputs_of, tiny


@check
def attention(answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> str:
    """answer(q, k, v), each [L, D] -> [L, D]: causal."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 8, generator=generator) for _ in range(3))
    got = answer(q, k, v)
    expect_tensor(got, (6, 8))
    changed = v.clone()
    changed[-1] += 100.0
    moved = (answer(q, k, changed) - got)[:-1].abs().max().item()
    case = f"Change the value of the last token only, and your outputs of earlier tokens change by up to {moved:.1f}"
    expect(moved < 1e-4, f"{case}. They look into the future: set those scores to −∞ before the softmax.")
    wanted = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    far = (got - wanted).abs().max().item()
    expect(far < 1e-4, f"Nothing looks ahead any more, but the output is off by {far:.2f}. Is 1/√D in the scores?")
    return "Every token sees itself and the tokens before it: equal to PyTorch's own attention, up to rounding."


@check
def padding_share(answer: Callable[[Sequence[int], Sequence[int]], float]) -> str:
    """answer(prompts, outputs) -> share of the positions that one static batch of m0 wastes."""
    for prompts, outputs in (((4, 4), (3, 3)), ((8, 2), (1, 1)), ((5, 5), (1, 6)), ((7, 3, 4), (2, 9, 1))):
        with tiny("m0", max_num_seqs=len(prompts)) as engine:
            engine.generate([[1] * length for length in prompts], outputs_of(outputs))
            measured = engine.metrics()["padding_share"]
        case = f"Prompts of {list(prompts)} tokens, outputs of {list(outputs)}, on m0"
        hint = "A step's rectangle is as wide as its longest row; a finished request keeps its row."
        expect_equal(answer(prompts, outputs), measured, case, hint, ".1%")
    return "That is what m0 counts, padding and rows of finished requests alike."


@check
def score_bytes(answer: Callable[[int, int, int, int], int]) -> str:
    """answer(rows, heads, length, bytes_of_a_number) -> bytes of one layer's score matrix."""
    expect_equal(answer(1, 1, 3, 4), 36, "One row, one head, 3 tokens in float32")
    expect_equal(answer(1, 9, 100, 2), 180_000, "One row, 9 heads, 100 tokens in bfloat16")
    expect_equal(answer(4, 9, 100, 2), 720_000, "Four rows of the same")
    return f"At 8,192 tokens one row of 9 heads in bfloat16 takes {answer(1, 9, 8192, 2) / 1e9:.1f} GB, in every layer."
