"""Matrix products with 17 to 128 tokens in half precision, with SwiGLU and residual on the way (GATED, BIAS, ADD, PDL:
see `triton_gemv`).

Such a product of a small model takes the GPU a few microseconds, of which it computes a fraction. The library's kernels
compute as fast; but each starts when the one in front has ended, and gates and split sums are kernels of their own. A
program of ours has OUT rows of the weight, and asks for them before it waits: they come into the L2 cache while the
kernel in front ends. Then it goes through the inputs K at a time, the next ones on their way to shared memory. RMSNorm
stays a kernel of its own, since every program would repeat it on all tokens.

Every program also reads x, which is more than its weights. With one tile of tokens, and where a norm follows, programs
share the inputs, too (`split_batch`): each multiplies a part of them, and the norm's kernel adds the parts up, in one
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu import triton_skinny
from common.execution.gpu.triton_elementwise import norm as rms_norm
from common.execution.gpu.triton_elementwise import silu_times

# pyright: basic

MAX_ROWS = 128
"""With more tokens the library is faster."""
TOKENS = 64
"""Of a program: the narrowest tile of Hopper's tensor cores."""
ENOUGH_PROGRAMS = 96


@triton.jit
def fetch_rows(weight, first, count, width):
    """Rows of the weight, two bytes a number, on their way into the L2 cache: one instruction of one thread."""
    tl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 one, thread, 0;"
        " @one cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [weight.to(tl.int64) + first.to(tl.int64) * width * 2, count * width * 2], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fetch_parts(rows, count):
    """The same of `count` numbers from each of these addresses on."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [rows.to(tl.int64), count * 2], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def batch_kernel(
    x, weight, bias, out, rows, width, outputs, x_stride, out_stride,
    TOKENS: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT: rows of the weight, half of them of gate and half of up if GATED. EVEN: K divides the width, and OUT the
    outputs. SPLIT: the parts of the inputs, and of out, which is float32 [SPLIT, rows, outputs] then."""
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    HALF: tl.constexpr = OUT // 2 if GATED else OUT
    token, side, step = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, K)
    first = tl.program_id(1) * HALF
    output = first + tl.arange(0, HALF)
    row = tl.minimum(first + side % HALF, outputs - 1) + side // HALF * outputs
    if PDL and EVEN and SPLIT == 1:
        fetch_rows(weight, first, HALF, width)
        if GATED:
            fetch_rows(weight, first + outputs, HALF, width)
    if PDL and SPLIT > 1:
        fetch_parts(weight + row.to(tl.int64) * width + tl.program_id(2) * (width // SPLIT), width // SPLIT)
    if BIAS:
        biases = tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    real = (token < rows)[:, None]
    x_at = x + token[:, None].to(tl.int64) * x_stride + step[None, :]
    weight_at = weight + row[:, None].to(tl.int64) * width + step[None, :]
    acc = tl.zeros([TOKENS, OUT], tl.float32)
    span = width // SPLIT
    begin = tl.multiple_of(tl.program_id(2) * span, K)
    for start in tl.range(begin, begin + span if SPLIT > 1 else width, K, num_stages=STAGES):
        inside = (start + step < width)[None, :]
        values = tl.load(x_at + start, mask=real if EVEN else real & inside, other=0.0)
        weights = tl.load(weight_at + start, mask=None if EVEN else inside, other=None if EVEN else 0.0)
        acc = tl.dot(values, weights.T, acc)
    if GATED:
        gate, up = tl.split(acc.to(dtype).to(tl.float32).reshape(TOKENS, 2, HALF).permute(0, 2, 1))
        acc = silu_times(gate, up, dtype)
    if BIAS:
        acc += biases[None, :]
    at, real = out + token[:, None].to(tl.int64) * out_stride + output[None, :], real & (output < outputs)[None, :]
    if SPLIT > 1:
        at += tl.program_id(2) * rows * outputs
    if ADD:
        acc += tl.load(at, mask=real, other=0.0).to(tl.float32)
    tl.store(at, acc.to(dtype), mask=real)


class Normed(NamedTuple):
    """RMSNorm of x by `gain`."""

    x: torch.Tensor
    gain: torch.Tensor
    result: torch.Tensor


class BatchConfig(NamedTuple):
    """Of a program: `out` rows of the weight, `k` inputs at a time, and how many such tiles are on their way."""

    out: int
    k: int
    stages: int


CONFIGS = BatchConfig(128, 64, 4), BatchConfig(64, 128, 3), BatchConfig(32, 64, 6), BatchConfig(16, 128, 6)


def batch_config(weight: torch.Tensor, rows: int) -> BatchConfig | None:
    """The largest tile that leaves `ENOUGH_PROGRAMS`, or the smallest; None where the library is faster."""
    if rows > MAX_ROWS or weight.itemsize != 2 or len(weight) >= 1 << 15:
        return None
    tiles = triton.cdiv(rows, TOKENS) * len(weight)
    return next((config for config in CONFIGS if tiles >= config.out * ENOUGH_PROGRAMS), CONFIGS[-1])


def batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    launch: dict[str, Any],
    config: BatchConfig,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    normed: Normed | None = None,
) -> torch.Tensor:
    """x [T, in] (rows may lie apart), 16 bits a number, times weight [out, in] transposed: [T, out]. See `gemv`.
    normed: rows that are normalised already, perhaps these."""
    if norm is not None and normed is not None and normed.x is x and normed.gain is norm:
        x = normed.result
    elif norm is not None:
        x = rms_norm(x, norm, eps, launch)
    rows, width = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    half = config.out // 2 if gated else config.out
    kernel: Any = batch_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(outputs, half))]
    kernel(
        x, weight, bias, out, rows, width, outputs, x.stride(0), out.stride(0), TOKENS=TOKENS, OUT=config.out,
        K=config.k, STAGES=config.stages, EVEN=width % config.k == 0 and outputs % half == 0, GATED=gated,
        BIAS=bias is not None, ADD=add_to is not None, SPLIT=1, num_warps=4, **launch,
    )  # fmt: skip
    return out


SPLIT = BatchConfig(32, 128, 4)
SPAN = 512
"""Inputs of a part: fewer are no time saved, but more parts to add up."""


def splits(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> bool:
    """Is this a product for `split_batch`: of whole parts, and of more rows than `triton_skinny` takes?"""
    fits = weight.shape[1] % SPAN == 0 and len(weight) % SPLIT.out == 0 and bias is None
    return fits and triton_skinny.MAX_ROWS < rows <= TOKENS and batch_config(weight, rows) is not None


def split_batch(x: torch.Tensor, weight: torch.Tensor, launch: dict[str, Any]) -> torch.Tensor:
    """The product in parts, whose sum it is: [P, T, out], float32."""
    (rows, width), outputs, config = x.shape, len(weight), SPLIT
    parts = torch.empty(width // SPAN, rows, outputs, dtype=torch.float32, device=x.device)
    kernel: Any = batch_kernel[(triton.cdiv(rows, TOKENS), outputs // config.out, len(parts))]
    kernel(
        x, weight, None, parts, rows, width, outputs, x.stride(0), outputs, TOKENS=TOKENS, OUT=config.out, K=config.k,
        STAGES=config.stages, EVEN=True, GATED=False, BIAS=False, ADD=False, SPLIT=len(parts), num_warps=4, **launch,
    )  # fmt: skip
    return parts
