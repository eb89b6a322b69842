"""One token times a 4-bit weight: as fast as the weight can be read.

A quarter of the bytes means a quarter of the time only if nothing else takes longer. At these sizes (1 to 3 MB) the
whole weight is on its way at once, so the kernel is one launch without a second stage: a program of a few rows of the
weight reads each of them whole, its threads side by side along the inputs, 16 bytes each, and adds up in registers.
What is left is arithmetic: three instructions a weight, by the two tricks below.

A launch costs about as much as the product. So norm, SiLU and residual are done on the way, and the weight is asked
for while the kernel in front still runs (NORM, GATED, ADD, EARLY): `common.kernels.triton_gemv` says why and how.
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


@triton.jit
def load_words(words, row, tile, WORDS: tl.constexpr, TILE: tl.constexpr):
    """A tile of each row's words, [ROWS, TILE]."""
    word = tile * TILE + tl.arange(0, TILE)
    at = words + row[:, None] * WORDS + word[None, :]
    if WORDS % TILE == 0:
        return tl.load(at)
    return tl.load(at, mask=(word < WORDS)[None, :], other=0)


@triton.jit
def load_groups(
    numbers, row, tile, split, other, GROUPS: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scales or zero points of a tile's blocks, [ROWS, BLOCKS] in float32; of groups smaller than a block, each
    block's group number `split`."""
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    group = block * SPLIT + split if SHARE == 1 else block // SHARE
    at = numbers + row[:, None] * GROUPS + group[None, :]
    return tl.load(at, mask=(group < GROUPS)[None, :], other=other).to(tl.float32)


@triton.jit
def gemv_kernel(
    x, words, scales, zeros, bias, gain, out, eps, x_stride, out_stride, magic,
    IN: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, SYMMETRIC: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    BLOCKS: tl.constexpr = TILE // 16
    PLANES: tl.constexpr = 8 // SPLIT  # planes of one group
    lane = tl.arange(0, ROWS)
    if GATED:  # a row of gate, the same of up, the next of gate, ...
        row = tl.program_id(0) * (ROWS // 2) + lane // 2 + lane % 2 * (OUT // 2)
    else:
        row = tl.program_id(0) * ROWS + lane
    packed = load_words(words, row, 0, WORDS, TILE)
    scale = load_groups(scales, row, 0, 0, 0.0, GROUPS, SPLIT, SHARE, BLOCKS)
    if EARLY:
        gdc_wait()
    x += tl.program_id(1) * x_stride
    if NORM:
        column = tl.arange(0, WIDTH)
        whole = tl.load(x + column, mask=column < IN, other=0.0).to(tl.float32)
        shrink = tl.rsqrt(tl.sum(whole * whole, 0) / IN + eps)
    sums = tl.zeros([ROWS], tl.float32)
    for tile in tl.static_range((WORDS + TILE - 1) // TILE):
        if tile:
            packed = load_words(words, row, tile, WORDS, TILE)
        word = tile * TILE + tl.arange(0, TILE)
        first = word // 16 * 128 + word % 16  # the input of a word's lowest four bits
        for split in tl.static_range(SPLIT):
            if tile + split:
                scale = load_groups(scales, row, tile, split, 0.0, GROUPS, SPLIT, SHARE, BLOCKS)
            part = tl.zeros([ROWS, TILE], tl.float32)
            inputs = tl.zeros([TILE], tl.float32)
            for plane in tl.static_range(split * PLANES, (split + 1) * PLANES):
                k = first + 16 * plane
                if IN % 128 == 0 and WORDS % TILE == 0:
                    value = tl.load(x + k).to(tl.float32)
                else:
                    value = tl.load(x + k, mask=k < IN, other=0.0).to(tl.float32)
                if NORM:
                    gains = tl.load(gain + k, mask=k < IN, other=0.0).to(tl.float32)
                    value = (gains * (value * shrink).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                # Four bits are not shifted down: they count 2^shift too much, and x is made so much smaller, once for
                # all rows. Five planes fit into the 23 bits of a mantissa, so one shift by 20 does for the others.
                shift = (4 * plane) % 20
                bits = packed if plane < 5 else packed >> 20
                code = ((bits & (15 << shift)) | magic).to(tl.float32, bitcast=True) - (8388608.0 + (8 << shift))
                part += code * (value * (1.0 / (1 << shift)))[None, :]
                inputs += value
            # The group ends: its sums get its scale. Codes were counted from 8, which the sum of its inputs puts right.
            total = tl.sum(part.reshape(ROWS, BLOCKS, 16), 2)
            if not SYMMETRIC:
                zero = load_groups(zeros, row, tile, split, 8.0, GROUPS, SPLIT, SHARE, BLOCKS)
                total += (8.0 - zero) * tl.sum(inputs.reshape(BLOCKS, 16), 1)[None, :]
            sums += tl.sum(total * scale, 1)
    if BIAS:
        sums += tl.load(bias + row).to(tl.float32)
    output = row
    if GATED:
        gate, up = tl.split(sums.to(dtype).to(tl.float32).reshape(ROWS // 2, 2))
        sums = silu_times(gate, up, dtype)
        output = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    at = out + tl.program_id(1) * out_stride + output
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
    """x [T, in] (rows may lie apart) times the weight: [T, out], or [T, out / 2] if gated. Each token reads the weight
    anew. norm, eps, gated, add_to: as in `common.kernels.triton_gemv.gemv`.

    config: ROWS of a program and WARPS; None takes the table's."""
    rows, warps = (config or gemv_config(weight.in_features, weight.out_features)).values()
    outputs = weight.out_features // 2 if gated else weight.out_features
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    # 32 threads of 4 words: with that, x lies in the registers where the products need it, and no thread waits.
    tile = min(128 * warps, triton.next_power_of_2(weight.words.shape[1]))
    kernel: Any = gemv_kernel[(weight.out_features // rows, x.shape[0])]
    kernel(
        x, weight.words, weight.scales, weight.zeros, weight.bias, norm, out, eps, x.stride(0), out.stride(0), MAGIC,
        IN=weight.in_features, OUT=weight.out_features, WORDS=weight.words.shape[1], GROUPS=weight.scales.shape[1],
        SPLIT=weight.split, SHARE=weight.share, ROWS=rows, TILE=tile, WIDTH=triton.next_power_of_2(weight.in_features),
        SYMMETRIC=weight.symmetric, NORM=norm is not None, GATED=gated, BIAS=weight.bias is not None,
        ADD=add_to is not None, num_warps=warps, **launch,
    )  # fmt: skip
    return out
