"""A few tokens times a 4-bit weight: as fast as the weight can be read, and what stands beside it is done on the way.

This is `common.kernels.triton_gemv` over 4 bits (NORM, GATED, ADD, EARLY: that file says what and why). A quarter of
the bytes means a quarter of the time only if nothing else takes longer, and in a small model something does: each
kernel waits for the one in front. So the words, and the scales and zeros of each block's first group, are asked for
before the wait; behind it a weight takes three instructions: a mask that makes it a float where it is, a subtraction,
a multiplication with addition. Zero points and scales are applied to sums; the factor of RMSNorm to the result, so that
nobody waits for it (x is not rounded in between, as `common` does). A thread holds the same words of all ROWS rows:
what it does to a number of x (load, gain) serves ROWS weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.triton_elementwise import silu_times
from stages.m7_gptq.kernels.triton_config import gemv_config
from stages.m7_gptq.kernels.triton_layout import TritonWeight

# pyright: basic

MAGIC = 0x4B000000
"""The bits of the float32 2^23, whose last bit counts one: `MAGIC | n` is the float 2^23 + n, no conversion needed."""


# Without a known alignment the compiler gives a thread single words of all rows, and not four words of one.
@triton.jit(do_not_specialize_on_alignment=["x", "words", "scales", "zeros", "gain"])
def gemv_kernel(
    x, words, scales, zeros, bias, gain, out, eps, x_stride, out_stride, magic,
    IN: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program holds the words of ROWS rows, [ROWS, TILE], and takes plane after plane out of them."""
    if EARLY:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    PLANES: tl.constexpr = 8 // SPLIT  # of one group
    first, lane = tl.program_id(0) * ROWS, tl.arange(0, ROWS)
    row = first + lane
    output = row
    if GATED:  # a row of gate, the same of up, the next of gate, ...
        row = first // 2 + lane // 2 + lane % 2 * (OUT // 2)
        output = first // 2 + tl.arange(0, ROWS // 2)
    word = tl.arange(0, TILE)
    k = word // 16 * 128 + word % 16  # in plane 0
    real = (word < WORDS)[None, :]
    low = tl.load(words + row[:, None] * WORDS + word[None, :], mask=real, other=0)
    high = low >> 20  # planes 5 to 7, where the mantissa of a float has room for them
    group = row[:, None] * GROUPS + (word // 16 * SPLIT // SHARE)[None, :]
    first_scale = tl.load(scales + group, mask=real, other=0.0).to(tl.float32)
    first_zero = tl.load(zeros + group, mask=real, other=0).to(tl.float32)
    gains = ()
    if NORM:
        for plane in tl.static_range(8):
            at = k + plane * 16
            gains = gains + (tl.load(gain + at, mask=at < IN, other=0.0).to(tl.float32),)  # noqa: RUF005
    if BIAS:
        biases = tl.load(bias + row).to(tl.float32)
    if EARLY:
        gdc_wait()
    for token in tl.static_range(TOKENS):
        total, squares = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for split in tl.static_range(SPLIT):
            scale, zero = first_scale, first_zero
            if split > 0:
                scale = tl.load(scales + group + split, mask=real, other=0.0).to(tl.float32)
                zero = tl.load(zeros + group + split, mask=real, other=0).to(tl.float32)
            products, values = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([TILE], tl.float32)
            for plane in tl.static_range(split * PLANES, (split + 1) * PLANES):
                at = x + token * x_stride + k + plane * 16
                value = tl.load(at, mask=k + plane * 16 < IN, other=0.0).to(tl.float32)
                if NORM:
                    squares += value * value
                    value *= gains[plane]
                if plane < 5:  # noqa: SIM108
                    bits = (low & (15 << (4 * plane))) | magic
                else:
                    bits = (high & (15 << (4 * plane - 20))) | magic
                code = bits.to(tl.float32, bitcast=True) - 8388608.0  # times 16 to the power of its place
                products += code * (value * (1.0 / (1 << (4 * (plane % 5)))))[None, :]
                values += value
            total += (products - zero * values[None, :]) * scale
        sums = tl.sum(total, 1)
        if NORM:
            sums *= tl.rsqrt(tl.sum(squares, 0) / IN + eps)
        if BIAS:
            sums += biases
        if GATED:
            gate, up = tl.split(sums.to(dtype).to(tl.float32).reshape(ROWS // 2, 2))
            sums = silu_times(gate, up, dtype)
        at = out + token * out_stride + output
        if ADD:
            sums += tl.load(at).to(tl.float32)
        tl.store(at, sums.to(dtype))


def gemv(
    x: torch.Tensor,
    weight: TritonWeight,
    launch: dict[str, Any],
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """x [T, in] (rows may lie apart), T up to `GEMV_TOKENS`, times the weight: [T, out], or [T, out / 2] if gated.
    norm, eps, gated, add_to: as in `common.kernels.triton_gemv.gemv`.

    config: ROWS of a program and WARPS; None takes the table's."""
    rows, warps = (config or gemv_config(weight.in_features, weight.out_features)).values()
    tokens, outputs = x.shape[0], weight.out_features // 2 if gated else weight.out_features
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    kernel: Any = gemv_kernel[(weight.out_features // rows,)]
    kernel(
        x, weight.words, weight.scales, weight.zeros, weight.bias, norm, out, eps, x.stride(0), out.stride(0), MAGIC,
        IN=weight.in_features, OUT=weight.out_features, WORDS=weight.words.shape[1],
        GROUPS=weight.scales.shape[1], SPLIT=weight.split, SHARE=weight.share, TOKENS=tokens,
        ROWS=rows, TILE=triton.next_power_of_2(weight.words.shape[1]), NORM=norm is not None, GATED=gated,
        BIAS=weight.bias is not None, ADD=add_to is not None, num_warps=warps, **launch,
    )  # fmt: skip
    return out
