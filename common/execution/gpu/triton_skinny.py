"""Matrix products with up to 32 tokens in half precision, where the only thing that counts is the stream of weights.

A program computes OUT outputs and holds their weights in registers. Its warps share the inputs: of each part, 1,024 of
them, a warp has every WARPS-th block of 32. Their sums are added up at the end, in one order: a result never changes
from run to run. NORM, GATED, BIAS, ADD, PDL: see `triton_gemv`.

No number moves from thread to thread on its way to the tensor cores. They multiply 16 inputs at a time, and a thread
holds numbers 2t, 2t + 1, 2t + 8 and 2t + 9 of them. Which inputs those are does not matter to a sum, so a thread takes
the eight neighbours that it has read, for two such products, of weights and of x alike (`operand`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.triton_elementwise import silu_times

# pyright: basic

PART = tl.constexpr(1024)
"""Inputs of a part."""
MAX_ROWS = 32
MANY_OUTPUTS = 1 << 15
"""With more than eight tokens the library is faster at such a product."""
MIN_PROGRAMS = 64
NUMBERS_PER_WARP = 14_336
"""Of weights, x, and the norm's weight, of which each of eight rows has a copy: 224 of a thread's 255 registers."""


@triton.jit
def operand(tile, ROWS: tl.constexpr, WARPS: tl.constexpr, SUMS: tl.constexpr):
    """[8, WARPS, ROWS / 8, 32 / WARPS, 32], as it is read, to [SUMS * WARPS, ROWS, 1024 / WARPS / SUMS]: every number
    stays in its thread. Row r of the result is row r % 8 of eight r // 8."""
    tile = tile.reshape(8, WARPS, ROWS // 8, SUMS, 32 // WARPS // SUMS, 4, 2, 2, 2)
    return tile.permute(3, 1, 2, 0, 4, 6, 7, 5, 8).reshape(SUMS * WARPS, ROWS, 1024 // WARPS // SUMS)


@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    x, weight, bias, gain, out, rows, width, outputs, eps, x_stride, out_stride,
    TOKENS: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TOKENS: rows of x, padded; OUT: rows of the weight, half of them of gate and half of up if GATED. SUMS: of a
    warp, so that not every product waits for the one before. EVEN: the width is whole parts."""
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    # The dimensions of a tile: eight rows, warps, eights of rows, blocks of a warp, inputs of a block. In this order
    # the compiler gives a thread eight neighbours of a row, and a warp eight rows: what `operand` counts on.
    eight, warp = tl.arange(0, 8)[:, None, None, None, None], tl.arange(0, WARPS)[None, :, None, None, None]
    block = tl.arange(0, 32 // WARPS)[None, None, None, :, None]
    column = (block * WARPS + warp) * 32 + tl.arange(0, 32)[None, None, None, None, :] + eight * 0
    HALF: tl.constexpr = OUT // 2 if GATED else OUT
    first, tile_number = tl.program_id(0) * TOKENS, tl.program_id(1)
    side = tl.arange(0, OUT // 8)[None, None, :, None, None]
    row = tl.minimum(tile_number * HALF + side % (HALF // 8) * 8 + eight, outputs - 1)
    row += side // (HALF // 8) * outputs
    token = tl.arange(0, TOKENS // 8)[None, None, :, None, None] * 8 + eight + first
    token = tl.minimum(token, rows - 1)
    weights, gains, values = (), (), ()
    for part in tl.static_range(PARTS):
        k = column + part * PART
        inside = None if EVEN else k < width
        other = None if EVEN else 0.0
        weights = weights + (tl.load(weight + row.to(tl.int64) * width + k, mask=inside, other=other),)  # noqa: RUF005
        if NORM:
            gains = gains + (tl.load(gain + k, mask=inside, other=other),)  # noqa: RUF005
    output = tile_number * HALF + tl.arange(0, HALF)[None, :]
    if BIAS:
        biases = tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    for part in tl.static_range(PARTS):
        k = column + part * PART
        inside = None if EVEN else k < width
        other = None if EVEN else 0.0
        values = values + (tl.load(x + token * x_stride + k, mask=inside, other=other),)  # noqa: RUF005
    # The tensor cores' tile is 16 x 8: eight tokens are its narrow side, more of them its long one.
    NARROW: tl.constexpr = TOKENS == 8 and OUT >= 16
    ROWS: tl.constexpr = TOKENS if NARROW or TOKENS > 8 else 16
    lane = tl.arange(0, ROWS)[:, None]
    at = out + (first + lane) * out_stride + output
    real = (lane < tl.minimum(rows - first, TOKENS)) & (output < outputs)
    if ADD:
        residual = tl.load(at, mask=real, other=0.0).to(tl.float32)
    # Otherwise the compiler puts loads behind products, where each would be waited for: no load moves past a barrier,
    # and no product past an exit, which is never taken.
    tl.debug_barrier()
    if rows == 0:
        return
    if NORM:
        squares = tl.zeros([8, 1, TOKENS // 8, 1, 1], tl.float32)
        for part in tl.static_range(PARTS):
            wide = values[part].to(tl.float32)
            own = tl.sum(tl.sum(wide * wide, 3, keep_dims=True), 4, keep_dims=True)
            squares += tl.sum(own, 1, keep_dims=True)
        factor = tl.rsqrt(squares / width + eps)
    acc = tl.zeros([SUMS * WARPS, OUT, ROWS] if NARROW else [SUMS * WARPS, ROWS, OUT], tl.float32)
    LATE: tl.constexpr = dtype != tl.float16  # is the factor of RMSNorm applied to the result?
    for part in tl.static_range(PARTS):
        value = values[part]
        if NORM:
            if not LATE:
                value = (value.to(tl.float32) * factor).to(dtype)
            value *= gains[part]
        if ROWS > TOKENS:
            value = tl.broadcast_to(value, (8, WARPS, 2, 32 // WARPS, 32))
        left, right = operand(value, ROWS, WARPS, SUMS), operand(weights[part], OUT, WARPS, SUMS)
        acc = tl.dot(right, left.permute(0, 2, 1), acc) if NARROW else tl.dot(left, right.permute(0, 2, 1), acc)
    result = tl.sum(acc, 0)
    if NARROW:
        result = result.permute(1, 0)
    if NORM and LATE:
        if ROWS > TOKENS:
            factor = tl.broadcast_to(factor, (8, 1, 2, 1, 1))
        result *= factor.permute(1, 2, 0, 3, 4).reshape(ROWS, 1)
    if GATED:
        gate, up = tl.split(result.to(dtype).to(tl.float32).reshape(ROWS, 2, HALF).permute(0, 2, 1))
        result = silu_times(gate, up, dtype)
    if BIAS:
        result += biases
    if ADD:
        result += residual
    tl.store(at, result.to(dtype), mask=real)


@dataclass(frozen=True)
class SkinnyConfig:
    """Of one program: `out` rows of the weight and `tokens`, 8 or more; `warps`: its threads, by 32."""

    out: int
    warps: int
    tokens: int = 8


def skinny_config(weight: torch.Tensor, rows: int, norm: bool = False, gated: bool = False) -> SkinnyConfig | None:
    """As many rows of the weight as a program's registers hold beside its tokens, but no fewer programs than
    `MIN_PROGRAMS`; None where the library is faster, or the kernel does not fit."""
    outputs, width = len(weight), triton.cdiv(weight.shape[1], PART.value) * PART.value
    if weight.itemsize != 2 or rows > (8 if outputs > MANY_OUTPUTS else 16 if gated else MAX_ROWS):
        return None
    sizes = (32, 16) if gated else (32, 16, 8)
    for warps, tokens in ((4, 16), (4, 8), (8, 16), (8, 8)) if rows > 8 else ((4, 8), (8, 8)):
        for out in sizes:
            enough = out == sizes[-1] or outputs >= out * MIN_PROGRAMS
            if enough and (out + tokens + (8 if norm else 0)) * width <= warps * NUMBERS_PER_WARP:
                return SkinnyConfig(out, warps, tokens)
    return None


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    launch: dict[str, Any],
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """x [T, in] (rows may lie apart), 16 bits a number, times weight [out, in] transposed: [T, out]. See `gemv`."""
    rows, width = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or skinny_config(weight, rows, norm is not None, gated)
    assert config is not None
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    tokens = config.tokens
    sums = min(32 // config.warps, max(1, 512 // (max(16, tokens) * config.out)))
    kernel: Any = skinny_kernel[(triton.cdiv(rows, tokens), triton.cdiv(len(weight), config.out))]
    kernel(
        x, weight, bias, norm, out, rows, width, outputs, eps, x.stride(0), out.stride(0), TOKENS=tokens,
        OUT=config.out, PARTS=triton.cdiv(width, PART.value), WARPS=config.warps, SUMS=sums,
        EVEN=width % PART.value == 0, NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=add_to is not None,
        num_warps=config.warps, **launch,
    )  # fmt: skip
    return out
