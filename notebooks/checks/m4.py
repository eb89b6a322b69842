"""The exercises of m4."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.models.config import ModelConfig
from notebooks.exercises import answered, check, expect, expect_equal, outputs_of, tiny
from stages.m4_flash_attention.attention import B_R, flash_attention

# m, l, acc: the largest score, the sum of exponentials relative to it, the sum over V with these weights
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _part(scores: torch.Tensor, values: torch.Tensor) -> Part:
    m = scores.max()
    p = (scores - m).exp()
    return m, p.sum(), p @ values


@check
def merge(answer: Callable[[Part, Part], Part]) -> str:
    """answer(part, part) -> the part for the keys of both."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 4, generator=generator)
    noise = torch.randn(12, generator=generator)
    for scores, cut, case in (
        (noise, 6, "two parts of 6 keys"),
        (noise + torch.arange(12) / 3, 5, "parts of 5 and 7 keys, the larger scores in the second"),
        (noise - torch.arange(12) / 3, 5, "parts of 5 and 7 keys, the larger scores in the first"),
        (400 + 30 * noise, 6, "two parts of 6 keys with scores around 400"),
    ):
        wanted = scores.softmax(0) @ values
        got = answer(_part(scores[:cut], values[:cut]), _part(scores[cut:], values[cut:]))
        is_part = isinstance(got, tuple) and len(got) == 3
        expect(is_part, f"For {case} your answer is {type(got).__name__}; it is a part again: (m, l, acc).")
        m, l, acc = got  # noqa: E741 - as in the papers
        finite = bool(torch.isfinite(l) and torch.isfinite(acc).all())
        why = "exp() of a score itself overflows from 89 on. Only differences to the larger maximum go into exp()"
        expect(finite, f"For {case} your sums are not finite: {why}.")
        expect_equal(float(m), float(scores.max()), f"The largest score of {case}")
        far = (acc / l - wanted).abs().max().item()
        own = f"that part's own maximum ({float(scores[:cut].max()):.1f} and {float(scores[cut:].max()):.1f})"
        why = f"The sums of each part are relative to {own}: bring both to the larger one first."
        expect(far < 1e-4, f"For {case} the output is off by {far:.3f}. {why}")
        both = answer(got, _part(scores[:1] - 1, values[:1]))  # the result is a part that can be joined again
        again = torch.cat((scores, scores[:1] - 1)).softmax(0) @ torch.cat((values, values[:1]))
        far = (both[2] / both[1] - again).abs().max().item()
        third = "the output is right, but joining your result with a third part is not: did you divide already?"
        expect(far < 1e-4, f"{case}: {third}")
    return "So contexts can be cut anywhere and joined in any order: Flash-Decoding needs no more."


class _Scores(TorchDispatchMode):
    """Bytes of the largest softmax that is computed while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "softmax" in str(func):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@check
def score_bytes(answer: Callable[[ModelConfig, int, int, int], int]) -> str:
    """answer(config, queries, context, bytes_of_a_number) -> bytes of one layer's scores, held against m3's tensors."""
    for prompt in (16, 64):
        with tiny("m3", max_num_seqs=1) as engine:
            config = engine.runner.model.config
            engine.add_request(list(range(prompt)), *outputs_of([2]))
            for queries, context, what in ((prompt, prompt, "its prefill"), (1, prompt + 16, "the decode after it")):
                with _Scores() as scores:
                    engine.step()
                got = answered(answer(config, queries, context, 4))
                heads = f"{config.num_heads} query heads and {config.num_kv_heads} KV heads"
                case = f"A prompt of {prompt} tokens, {what}: bytes for {queries} queries and {context} slots, float32"
                hint = f"m3's tensor, with {heads}, is {scores.bytes / max(got, 1):g} times as large."
                expect_equal(got, scores.bytes, case, hint, ",")
    long = answer(config, 32_768, 32_768, 2)
    return f"Even for this tiny model a prompt of 32,768 tokens would take {long / 1e9:.0f} GB, in every layer."


class _CountTiles(TorchFunctionMode):
    """Calls of `amax`: `flash_attention` makes one for each tile of scores."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.amax
        return func(*args, **(kwargs or {}))


@check
def tiles(answer: Callable[[int, int, int], int]) -> str:
    """answer(queries, context, tile) -> tiles of scores that are computed, held against `flash_attention`."""
    for queries, context, what in (
        (64, 64, "one tile of queries"),
        (256, 256, "a whole prompt"),
        (200, 200, "a prompt that ends inside a tile"),
        (64, 256, "a chunk at the end of a context"),
        (100, 250, "a chunk whose tiles begin inside tiles of keys"),
        (1, 256, "a decode"),
    ):
        q, blocks = torch.zeros(queries, 1, 4), torch.zeros(-(-context // B_R), B_R, 1, 4)
        with _CountTiles() as counted:
            flash_attention(q, blocks, blocks, [list(range(len(blocks)))], [(0, queries, context)])
        got, everything = answer(queries, context, B_R), -(-queries // B_R) * -(-context // B_R)
        hint = "That is all tiles, also those behind the diagonal." if got == everything else ""
        case = f"{queries} queries at the end of a context of {context} ({what}), tiles of {B_R}, in `flash_attention`"
        expect_equal(got, counted.count, case, hint)
    whole = answer(4096, 4096, 64) / 64**2
    return f"Of a prompt of 4,096 tokens {whole:.0%} of the tiles are computed: causality saves nearly half."
