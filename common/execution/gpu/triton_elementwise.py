"""The kernels between the matrix products, and the one in front of them all, for any number of tokens: each tensor is
read once and written once.

Definitions: `RMSNorm`, `swiglu` and `rotate` of `common.models.layers`. Sums are in float32 and a value is rounded to
the model's dtype wherever the definition rounds it, so that both give the same numbers, but for the order of a sum.

PDL: the kernel may start while the one in front of it still runs (programmatic dependent launch, CUDA's name for
it, on Hopper GPUs and later): it waits, `gdc_wait`, before it touches anything that another kernel writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# pyright: basic


@triton.jit
def wait(PDL: tl.constexpr):
    """The next kernel may start; this one goes on when the one in front of it has ended."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def rms(value, gain, width, eps, dtype: tl.constexpr):
    """gain * value / root mean square; value and gain: one row, float32."""
    mean_square = tl.sum(value * value, 0) / width
    return gain * (value * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, float32."""
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up


@triton.jit
def embed_kernel(
    input_ids, positions, embedding, table, x, angles, width, angle_width,
    WIDTH: tl.constexpr, ANGLE_WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: its row of the embedding, and its position's of the rotary table."""
    row, column, angle = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, ANGLE_WIDTH)
    inside, angle_inside = column < width, angle < angle_width
    wait(PDL)
    token, position = tl.load(input_ids + row), tl.load(positions + row)
    value = tl.load(embedding + token * width + column, mask=inside)
    turn = tl.load(table + position * angle_width + angle, mask=angle_inside)
    tl.store(x + row * width + column, value, mask=inside)
    tl.store(angles + row * angle_width + angle, turn, mask=angle_inside)


@triton.jit
def norm_kernel(x, weight, out, width, eps, x_stride, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """One program a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < width
    dtype: tl.constexpr = out.dtype.element_ty
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, rms(value, gain, width, eps, dtype).to(dtype), mask=inside)


@triton.jit
def add_norm_kernel(
    x, parts, weight, out, rows, width, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program a row of x, to which its parts, float32 [PARTS, rows, width], are added."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, at = column < width, row * width + column
    dtype: tl.constexpr = out.dtype.element_ty
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        added += tl.load(parts + part * rows * width + at, mask=inside, other=0.0)
    value = (value + added).to(dtype)
    tl.store(x + at, value, mask=inside)
    tl.store(out + at, rms(value.to(tl.float32), gain, width, eps, dtype).to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(gate_up, out, width, TILE: tl.constexpr, PDL: tl.constexpr):
    """One program a tile of one row; gate_up [T, 2 * width], out [T, width]."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    dtype: tl.constexpr = out.dtype.element_ty
    wait(PDL)
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, silu_times(gate, up, dtype).to(dtype), mask=inside)


@triton.jit
def gained(value, is_query, q_gain, k_gain, inside, dtype: tl.constexpr):
    """Normalised halves of heads times the weight of the norm of queries, or of that of keys."""
    gain = tl.where(
        is_query,
        tl.load(q_gain, mask=inside, other=0.0).to(tl.float32),
        tl.load(k_gain, mask=inside, other=0.0).to(tl.float32),
    )
    return (gain * value.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def norm_rotate_kernel(
    heads, q_norm, k_norm, cos, sin, num_q, num_heads, eps, token_stride, angle_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for HEADS heads of one token, in place: both halves of a head are read before either is written.
    HALF: the power of two that holds DIM / 2."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (column < DIM // 2)
    dtype: tl.constexpr = heads.dtype.element_ty
    wait(PDL)
    at = heads + token * token_stride + head * DIM + column
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean_square = (tl.sum(low * low, 1, keep_dims=True) + tl.sum(high * high, 1, keep_dims=True)) / DIM
        scale = tl.rsqrt(mean_square + eps)
        is_query = head < num_q
        low = gained(low * scale, is_query, q_norm + column, k_norm + column, column < DIM // 2, dtype)
        column_high = column + DIM // 2
        high = gained(high * scale, is_query, q_norm + column_high, k_norm + column_high, column < DIM // 2, dtype)
    angle = token * angle_stride + column
    c = tl.load(cos + angle, mask=column < DIM // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + DIM // 2, mask=column < DIM // 2, other=0.0).to(tl.float32)  # the half without a sign
    tl.store(at, (low * c - high * s).to(dtype), mask=inside)
    tl.store(at + DIM // 2, (high * c + low * s).to(dtype), mask=inside)


def embed(
    input_ids: torch.Tensor, positions: torch.Tensor, embedding: torch.Tensor, table: torch.Tensor,
    launch: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """input_ids, positions [T], 64-bit; embedding [V, N]; table [P, 2, 1, D]. Gives x [T, N], cos and sin [T, 1, D]."""
    tokens, width, angle_width = len(input_ids), embedding.shape[1], table[0].numel()
    x = torch.empty(tokens, width, dtype=embedding.dtype, device=embedding.device)
    angles = torch.empty(tokens, *table.shape[1:], dtype=table.dtype, device=table.device)
    padded = triton.next_power_of_2(width)
    kernel: Any = embed_kernel[(tokens,)]
    kernel(
        input_ids, positions, embedding, table, x, angles, width, angle_width, WIDTH=padded,
        ANGLE_WIDTH=triton.next_power_of_2(angle_width), num_warps=warps(padded), **launch,
    )  # fmt: skip
    cos, sin = angles.unbind(1)
    return x, cos, sin


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, launch: dict[str, Any]) -> torch.Tensor:
    """x [T, N], rows may lie apart."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.shape
    padded = triton.next_power_of_2(width)
    kernel: Any = norm_kernel[(rows,)]
    kernel(x, weight, out, width, eps, x.stride(0), WIDTH=padded, num_warps=warps(padded), **launch)
    return out


def add_norm(
    x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float, launch: dict[str, Any]
) -> torch.Tensor:
    """x [T, N] gains the sum of parts [P, T, N]; returns its norm."""
    out, (rows, width) = torch.empty_like(x), x.shape
    padded = triton.next_power_of_2(width)
    kernel: Any = add_norm_kernel[(rows,)]
    kernel(x, parts, weight, out, rows, width, eps, PARTS=len(parts), WIDTH=padded, num_warps=warps(padded), **launch)
    return out


def swiglu(gate_up: torch.Tensor, launch: dict[str, Any]) -> torch.Tensor:
    """gate_up [T, 2 * I], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    tile = min(1024, triton.next_power_of_2(width))
    kernel: Any = swiglu_kernel[(rows, triton.cdiv(width, tile))]
    kernel(gate_up, out, width, TILE=tile, num_warps=warps(tile), **launch)
    return out


def qk_norm_rope(
    heads: torch.Tensor, num_q: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
    cos: torch.Tensor, sin: torch.Tensor, launch: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """In place: heads [T, H, D], whose tokens may lie apart, the heads of one token not. Norm weights [D], or None."""
    tokens, count, dim = heads.shape
    per_program = 4
    kernel: Any = norm_rotate_kernel[(tokens, triton.cdiv(count, per_program))]
    kernel(
        heads, q_norm, k_norm, cos, sin, num_q, count, eps, heads.stride(0), cos.stride(0), HEADS=per_program,
        DIM=dim, HALF=triton.next_power_of_2(dim // 2), NORM=q_norm is not None, num_warps=2, **launch,
    )  # fmt: skip
    return heads


def warps(numbers: int) -> int:
    """At least eight numbers, 16 bytes in half precision, for each thread."""
    return max(1, min(8, numbers // 256))
