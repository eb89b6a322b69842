"""A 4-bit weight written out in 16 bits: with many tokens, multiplying it by cuBLAS saves more than that costs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from stages.m7_gptq.fast.kernels.triton_int4_layout import TritonWeight

# pyright: basic

ROWS = 32
DEQUANTIZE_TOKENS = 256
"""From this many tokens on, writing the weight out in 16 bits costs less than our matrix product loses to cuBLAS."""


@triton.jit
def dequantize_kernel(
    words, scales, zeros, out, IN: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, row, word = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 16)
    packed = tl.load(words + row[:, None] * (16 * BLOCKS) + block * 16 + word[None, :])
    for plane in tl.static_range(8):
        where = row * GROUPS + block * SPLIT // SHARE + plane * SPLIT // 8
        scale = tl.load(scales + where).to(tl.float32)
        zero = tl.load(zeros + where).to(tl.float32)
        weight = (((packed >> (4 * plane)) & 15).to(tl.float32) - zero[:, None]) * scale[:, None]
        k = block * 128 + plane * 16 + word
        tl.store(out + row[:, None] * IN + k[None, :], weight.to(out.dtype.element_ty), mask=(k < IN)[None, :])


def dequantize(weight: TritonWeight, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], computed in float32 and rounded to `dtype`."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    kernel: Any = dequantize_kernel[(weight.blocks, weight.out_features // ROWS)]
    kernel(
        weight.words, weight.scales, weight.zeros, out, IN=weight.in_features, BLOCKS=weight.blocks,
        GROUPS=weight.scales.shape[1], SPLIT=weight.split, SHARE=weight.share, ROWS=ROWS,
    )  # fmt: skip
    return out
