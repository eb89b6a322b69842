"""The exercises of m1."""

from collections.abc import Callable

import torch

from common.models.config import ModelConfig
from common.models.sources.random_weights import PRESETS
from notebooks.exercises import answered, check, expect, expect_equal, expect_tensor, outputs_of, tiny


@check
def kv_bytes(answer: Callable[[ModelConfig, int, int], int]) -> str:
    """answer(config, num_tokens, bytes_of_a_number) -> bytes, held against what m1 really allocates."""
    with tiny("m1", max_model_len=64, max_num_seqs=3) as engine:
        config, allocated = engine.runner.model.config, engine.runner.attention.kv_bytes()
    got = answered(answer(config, 3 * 64, 4))
    heads = f"{config.num_heads} query heads and {config.num_kv_heads} KV heads of {config.head_dim}"
    case = f"Bytes that m1 allocates for 3 rows of 64 tokens in float32, {config.num_layers} layers, {heads}"
    hint = f"You are off by a factor of {got / allocated:g}. Whose heads are stored?"
    expect_equal(got, allocated, case, hint, ",")
    qwen = PRESETS["qwen3-0.6b"]
    expect_equal(answer(qwen, 1, 2), 114_688, "One token of Qwen3-0.6B in bfloat16")
    return f"m1 allocates exactly that: {allocated:,} bytes. A token of Qwen3-0.6B takes {answer(qwen, 1, 2):,}."


@check
def decode_attention(answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]) -> str:
    """answer(q [H, D], keys [H, slots, D], values [H, slots, D], length) -> [H, D]."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 8):
        q, keys, values = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (2, 8, 4), (2, 8, 4)))
        keys[:, length:], values[:, length:] = 7.0, 1e4  # what an earlier request left there
        weights = torch.softmax(torch.einsum("hd,hsd->hs", q, keys[:, :length]) / 4**0.5, dim=-1)
        wanted = torch.einsum("hs,hsd->hd", weights, values[:, :length])
        got = answer(q, keys.clone(), values.clone(), length)
        expect_tensor(got, (2, 4), "One row a head.")
        far = (got - wanted).abs().max().item()
        case = f"With {length} of 8 slots written your output is off by {far:,.3f}"
        expect(far < 100, f"{case}: it has read slots from {length} on, where an earlier request left its values.")
        hint = "Only slots below `length` are seen; are the scale, 1/√D, and the softmax over the slots right?"
        expect(far < 1e-4, f"{case}. {hint}")
    return "It reads the slots that are written, and no others."


@check
def positions(answer: Callable[[int, int, bool], int]) -> str:
    """answer(prompt, outputs, cached) -> positions that go through the model, held against the engines' counters."""
    for prompt, outputs in ((5, 1), (5, 2), (7, 6)):
        for stage, cached in (("m0", False), ("m1", True)):
            with tiny(stage) as engine:
                engine.generate([list(range(1, prompt + 1))], outputs_of([outputs]))
                counted = engine.metrics()["computed_tokens"]
            expect_equal(answer(prompt, outputs, cached), counted, f"{stage}, {prompt} tokens in, {outputs} out")
    said = f"{answer(128, 128, False):,} positions without a cache and {answer(128, 128, True):,} with one"
    return f"For 128 in and 128 out that is {said}. The last token never goes through the model: no token follows it."
