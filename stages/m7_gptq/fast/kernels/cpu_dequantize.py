"""PyTorch's packed 4-bit weight written out in bfloat16: with many tokens, oneDNN's product saves more than that costs.

PyTorch (`_convert_weight_to_int4pack_for_cpu`) lays the codes out for its own kernel, and how depends on the processor:
this reads the layout of AVX-512. For 64 outputs at a time and each input, 32 bytes: outputs 0 ... 31 in the low four
bits, 32 ... 63 in the high ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from common.execution.cpu.compiled import compiled

# pyright: basic

OUTPUTS = 64


@compiled(parallel=True)
def _dequantize(packed, scales, offsets, out):
    """packed: uint8 [out / 64, in, 32]; scales, offsets: float32 [groups, out]; out: bits of bfloat16 [in, out]."""
    blocks, inputs, half = packed.shape
    groups = len(scales)
    size = inputs // groups
    low, high = np.uint8(15), np.uint8(4)
    for task in prange(blocks * groups):
        block, group = task // groups, task % groups
        first = block * OUTPUTS
        scale, offset = scales[group, first : first + OUTPUTS], offsets[group, first : first + OUTPUTS]
        row = np.empty(OUTPUTS, np.float32)
        bits = row.view(np.uint32)
        for k in range(group * size, (group + 1) * size):
            codes, result = packed[block, k], out[k, first : first + OUTPUTS]
            for n in range(half):
                row[n] = np.float32(codes[n] & low) * scale[n] + offset[n]
            for n in range(half):
                row[half + n] = np.float32(codes[n] >> high) * scale[half + n] + offset[half + n]
            for n in range(OUTPUTS):  # to nearest, ties to even
                odd = (bits[n] >> np.uint32(16)) & np.uint32(1)
                result[n] = (bits[n] + np.uint32(0x7FFF) + odd) >> np.uint32(16)


def dequantize(packed: torch.Tensor, scales_and_zeros: torch.Tensor, out: torch.Tensor) -> None:
    """packed: uint8 [out, in / 2] as PyTorch made it; scales_and_zeros [groups, out, 2] as `CpuInt4Linear` keeps them;
    out: bfloat16 [in, out], contiguous."""
    inputs, outputs = out.shape
    scales, middles = scales_and_zeros.float().unbind(-1)
    scales = scales.contiguous()
    offsets = middles - 8 * scales  # PyTorch's kernel counts codes from 8
    codes = packed.view(outputs // OUTPUTS, inputs, OUTPUTS // 2)
    _dequantize(codes.numpy(), scales.numpy(), offsets.numpy(), out.view(torch.uint16).numpy())


def knows_layout() -> bool:
    """Does PyTorch, on this processor, lay codes out as `dequantize` reads them?"""
    codes = torch.arange(OUTPUTS * 32, dtype=torch.int32).mul_(7).remainder_(16).view(OUTPUTS, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    low, high = codes.T.split(OUTPUTS // 2, dim=1)
    return torch.equal(packed.flatten(), (low | high << 4).to(torch.uint8).flatten())
