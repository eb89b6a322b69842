"""One token times a 4-bit weight: as fast as the weight can be read.

A quarter of the bytes means a quarter of the time only if nothing else takes longer. At these sizes (1 to 3 MB) the
whole weight is on its way at once, so the kernel is one launch without a second stage: a program of a few rows of the
weight reads each of them whole, its threads side by side along the inputs, 16 bytes each, and adds up in registers.
What is left is arithmetic: three instructions a weight, by the two tricks below.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from stages.m7_gptq.kernels.triton_config import gemv_config
from stages.m7_gptq.kernels.triton_layout import TritonWeight

# pyright: basic

MAGIC = 0x4B000000
"""The bits of the float32 2^23, whose last bit counts one: `MAGIC | n` is the float 2^23 + n, no conversion needed."""


@triton.jit
def gemv_kernel(
    x, words, scales, zeros, bias, out, x_stride, magic,
    IN: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    BLOCKS: tl.constexpr = TILE // 16
    PLANES: tl.constexpr = 8 // SPLIT  # planes of one group
    sums = tl.zeros([ROWS], tl.float32)
    for tile in tl.static_range((WORDS + TILE - 1) // TILE):
        word = tile * TILE + tl.arange(0, TILE)
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        at = row[:, None] * WORDS + word[None, :]
        if WORDS % TILE == 0:
            packed = tl.load(words + at)
        else:
            packed = tl.load(words + at, mask=(word < WORDS)[None, :], other=0)
        first = word // 16 * 128 + word % 16  # the input of a word's lowest four bits
        part = tl.zeros([ROWS, TILE], tl.float32)
        inputs = tl.zeros([TILE], tl.float32)
        for plane in tl.static_range(8):
            k = first + 16 * plane
            if IN % 128 == 0 and WORDS % TILE == 0:
                value = tl.load(x + token * x_stride + k).to(tl.float32)
            else:
                value = tl.load(x + token * x_stride + k, mask=k < IN, other=0.0).to(tl.float32)
            # Four bits are not shifted down: they count 2^shift too much, and x is made so much smaller, once for all
            # rows. Five planes fit into the 23 bits of a mantissa, so one shift by 20 does for the other three.
            shift = (4 * plane) % 20
            bits = packed if plane < 5 else packed >> 20
            code = ((bits & (15 << shift)) | magic).to(tl.float32, bitcast=True) - (8388608.0 + (8 << shift))
            part += code * (value * (1.0 / (1 << shift)))[None, :]
            inputs += value
            if (plane + 1) % PLANES == 0:  # the group ends: its sums get its scale
                group = block * SPLIT + plane // PLANES if SHARE == 1 else block // SHARE
                where = row[:, None] * GROUPS + group[None, :]
                exists = (group < GROUPS)[None, :]
                scale = tl.load(scales + where, mask=exists, other=0.0).to(tl.float32)
                total = tl.sum(part.reshape(ROWS, BLOCKS, 16), 2)
                if not SYMMETRIC:  # codes were counted from 8: put right by the sum of the group's inputs
                    zero = tl.load(zeros + where, mask=exists, other=8).to(tl.float32)
                    total += (8.0 - zero) * tl.sum(inputs.reshape(BLOCKS, 16), 1)[None, :]
                    inputs = tl.zeros([TILE], tl.float32)
                sums += tl.sum(total * scale, 1)
                part = tl.zeros([ROWS, TILE], tl.float32)
    if BIAS:
        sums += tl.load(bias + row).to(tl.float32)
    tl.store(out + token * OUT + row, sums.to(out.dtype.element_ty))


def gemv(x: torch.Tensor, weight: TritonWeight, out: torch.Tensor, config: dict[str, int] | None = None) -> None:
    """x [T, in] (rows may lie apart) times the weight into out [T, out], contiguous: each token reads the weight anew.

    config: ROWS of a program and num_warps; None takes the table's."""
    rows, warps = (config or gemv_config(weight.in_features, weight.out_features)).values()
    # 32 threads of 4 words: with that, x lies in the registers where the products need it, and no thread waits.
    tile = min(128 * warps, triton.next_power_of_2(weight.words.shape[1]))
    kernel: Any = gemv_kernel[(weight.out_features // rows, x.shape[0])]
    kernel(
        x, weight.words, weight.scales, weight.zeros, weight.bias, out, x.stride(0), MAGIC,
        IN=weight.in_features, OUT=weight.out_features, WORDS=weight.words.shape[1], GROUPS=weight.scales.shape[1],
        SPLIT=weight.split, SHARE=weight.share, ROWS=rows, TILE=tile, SYMMETRIC=weight.symmetric,
        BIAS=weight.bias is not None, num_warps=warps,
    )  # fmt: skip
