"""Matrix products with one token, where the only thing that counts is the stream of weights: for those that
`triton_skinny` does not take, in float32 or with very long rows.

A program computes OUT outputs and holds their weights, OUT x WIDTH numbers, in registers: all its loads are on their
way at once, 16 bytes each. For the layers of a small model all programs fit on the GPU together.

PDL (see `triton_elementwise`): weights do not depend on the kernel in front, so they are loaded before waiting for it.

What comes before and after the product is done on the way, because a kernel of its own would cost more than the
arithmetic: RMSNorm of x (NORM; every program repeats it, x is small), SiLU of the gate times up (GATED; the program
has both rows), bias (BIAS), the residual (ADD).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.triton_elementwise import rms, silu_times

# pyright: basic

BYTES_PER_PROGRAM = 16 << 10
MIN_PROGRAMS = 512  # four on each processor of a large GPU


@triton.jit
def gemv_kernel(
    x, weight, bias, gain, out, width, outputs, eps, OUT: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    output, column = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, WIDTH)
    exists, inside = output < outputs, column < width
    tile = output[:, None].to(tl.int64) * width + column[None, :]
    weights = tl.load(weight + tile, mask=exists[:, None] & inside[None, :], other=0.0)
    if GATED:
        up = weight + outputs * width
        up_weights = tl.load(up + tile, mask=exists[:, None] & inside[None, :], other=0.0)
    if NORM:
        gains = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        biases = tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        value = rms(value, gains, width, eps, dtype).to(dtype).to(tl.float32)
    result = tl.sum(weights.to(tl.float32) * value[None, :], 1)
    if GATED:
        up_result = tl.sum(up_weights.to(tl.float32) * value[None, :], 1).to(dtype).to(tl.float32)
        result = silu_times(result.to(dtype).to(tl.float32), up_result, dtype)
    if BIAS:
        result += biases
    if ADD:
        result += tl.load(out + output, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(dtype), mask=exists)


def gemv_config(outputs: int, width: int, itemsize: int, gated: bool) -> tuple[int, int]:
    """The outputs and the warps of a program: as many rows of the weight as make `BYTES_PER_PROGRAM`, a power of two,
    fewer where that would leave `MIN_PROGRAMS` unmet; a warp for each kilobyte of a row."""
    row_bytes = triton.next_power_of_2(width) * itemsize * (2 if gated else 1)
    out = max(1, min(BYTES_PER_PROGRAM // row_bytes, outputs // MIN_PROGRAMS))
    return 1 << (out.bit_length() - 1), max(1, min(8, row_bytes // 1024))


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    launch: dict[str, Any],
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [1, in] times weight [out, in] transposed; gives [1, out].

    norm [in]: the weight of an RMSNorm that x goes through first. gated: weight is gate and up, below one another,
    and the result is silu(gate) * up, [1, out / 2]. add_to [1, out]: is added to, in place, and returned.
    """
    width = x.shape[1]
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    per_program, warps = gemv_config(outputs, width, weight.itemsize, gated)
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    kernel: Any = gemv_kernel[(triton.cdiv(outputs, per_program),)]
    kernel(
        x, weight, bias, norm, out, width, outputs, eps, OUT=per_program, WIDTH=triton.next_power_of_2(width),
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=add_to is not None,
        num_warps=warps, **launch,
    )  # fmt: skip
    return out
