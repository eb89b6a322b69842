"""What all kernels that choose tokens read: a row's logits, penalised and banned as `execution.draws` says.

Of `Draws`, a row of `settings` has 8 columns and one of `keys` 4; `edges` of `triton_filter` has 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.execution.draws import BANNED, COUNT, ONE

# pyright: basic

CHUNK = 2048
MARK, MOST, ALLOWED = tl.constexpr(ONE), tl.constexpr(COUNT), tl.constexpr(~BANNED)


@triton.jit
def read_logits(logits, stride, settings, keys, marks, vocab, row, token, MARKED: tl.constexpr):
    """The logits of these tokens, float32; -inf behind the vocabulary. In rows without an option no mark is read."""
    values = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    if MARKED:
        repetition = tl.load(settings + row * 8 + 4)
        presence = tl.load(settings + row * 8 + 5)
        frequency = tl.load(settings + row * 8 + 6)
        early = tl.load(keys + row * 4 + 1) < tl.load(keys + row * 4 + 2)
        if early | (repetition != 1) | (presence != 0) | (frequency != 0):
            slot = tl.load(keys + row * 4 + 3)
            mark = tl.load(marks + slot * vocab + token, mask=token < vocab, other=0).to(tl.int32)
            count = ((mark & MOST) // MARK).to(tl.float32)
            scaled = tl.where(values > 0, values / repetition, values * repetition)
            values = tl.where((mark & ALLOWED) != 0, scaled, values)
            values -= tl.where(count > 0, presence, 0.0) + count * frequency
            values = values.to(logits.dtype.element_ty).to(tl.float32)
            values = tl.where(early & (mark < 0), -float("inf"), values)
    return values


@triton.jit
def exp_above(logits, top, temperature):
    """exp((logits - top) / temperature); 0 where a logit is -inf, even if all are."""
    return tl.exp((logits - tl.maximum(top, -1e38)) / temperature)


@triton.jit
def ordered(values, dtype: tl.constexpr):
    """Logits as whole numbers in the same order: of 16 bits where the model's are, of 32 otherwise."""
    values = tl.where(values == 0, 0.0, values)  # -0 is no less
    if dtype.primitive_bitwidth == 16:
        bits = values.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 15) & 0x7FFF)
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(number, dtype: tl.constexpr):
    """The logit of a number of `ordered`."""
    if dtype.primitive_bitwidth == 16:
        bits = number ^ ((number >> 15) & 0x7FFF)
        return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kept(values, weights, edges, settings, row, dtype: tl.constexpr):
    """Which tokens are above the row's edge and min_p, and which are at the edge."""
    edge, min_p = tl.load(edges + row * 4).to(tl.int32), tl.load(settings + row * 8 + 3)
    number = ordered(values, dtype)
    return (number > edge) & (weights >= min_p), number == edge


@triton.jit
def tie_weight(edges, settings, row, top, temperature, dtype: tl.constexpr):
    """Of a token at the row's edge; 0 if min_p leaves it out."""
    weight = exp_above(value_of(tl.load(edges + row * 4).to(tl.int32), dtype), top, temperature)
    return tl.where(weight >= tl.load(settings + row * 8 + 3), weight, 0.0)
