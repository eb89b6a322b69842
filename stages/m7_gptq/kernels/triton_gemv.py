"""A few tokens times a 4-bit weight: as fast as the weight can be read, and what stands beside it is done on the way.

This is `common.kernels.triton_gemv` over 4 bits (NORM, GATED, ADD, EARLY: that file says what and why). A quarter of
the bytes means a quarter of the time only if nothing else takes longer, and in a small model something does: each
kernel waits for the one in front. So all that the weights need is done before the wait, scales included. Then a token
is loaded, multiplied and added up, as in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.triton_elementwise import rms, silu_times
from stages.m7_gptq.kernels.triton_config import gemv_config
from stages.m7_gptq.kernels.triton_layout import TritonWeight

# pyright: basic

MAGIC = 0x4B000000
"""The bits of the float32 2^23, whose last bit counts one: `MAGIC | n` is the float 2^23 + n, no conversion needed."""


@triton.jit
def gemv_kernel(
    x, words, scales, zeros, bias, gain, out, eps, x_stride, out_stride, magic,
    IN: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program holds ROWS rows of the weight, [ROWS, 8, TILE]: eight planes of the TILE words of each."""
    if EARLY:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    PLANES: tl.constexpr = 8 // SPLIT  # of one group
    BLOCKS: tl.constexpr = TILE // 16
    first, lane = tl.program_id(0) * ROWS, tl.arange(0, ROWS)
    row = first + lane
    output = row
    if GATED:  # a row of gate, the same of up, the next of gate, ...
        row = first // 2 + lane // 2 + lane % 2 * (OUT // 2)
        output = first // 2 + tl.arange(0, ROWS // 2)
    word, column = tl.arange(0, TILE), tl.arange(0, 8 * TILE)
    packed = tl.load(words + row[:, None] * WORDS + word[None, :], mask=(word < WORDS)[None, :], other=0)
    split, block = tl.arange(0, SPLIT)[None, :, None], tl.arange(0, BLOCKS)[None, None, :]
    group = block * SPLIT + split if SHARE == 1 else block // SHARE + split
    at_group = row[:, None, None] * GROUPS + group
    scale = tl.load(scales + at_group, mask=group < GROUPS, other=0.0).to(tl.float32)
    zero = tl.load(zeros + at_group, mask=group < GROUPS, other=0).to(tl.float32) + 8388608.0
    code = (packed[:, None, :] >> (4 * tl.arange(0, 8))[None, :, None]) & 15
    weight = (code | magic).to(tl.float32, bitcast=True).reshape(ROWS, SPLIT, PLANES, BLOCKS, 16)
    weight = (weight - zero.reshape(ROWS, SPLIT, 1, BLOCKS, 1)) * scale.reshape(ROWS, SPLIT, 1, BLOCKS, 1)
    weight = weight.reshape(ROWS, 8, TILE)
    if NORM:
        gains = tl.load(gain + column, mask=column < IN, other=0.0).to(tl.float32)
    if BIAS:
        biases = tl.load(bias + row).to(tl.float32)
    if EARLY:
        gdc_wait()
    for token in tl.static_range(TOKENS):
        value = tl.load(x + token * x_stride + column, mask=column < IN, other=0.0).to(tl.float32)
        if NORM:
            value = rms(value, gains, IN, eps, dtype).to(dtype).to(tl.float32)
        value = tl.permute(value.reshape(BLOCKS, 8, 16), (1, 0, 2)).reshape(8, TILE)
        sums = tl.sum(tl.sum(weight * value[None, :, :], 1), 1)
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
    rows, warps = (config or gemv_config(weight.in_features)).values()
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
