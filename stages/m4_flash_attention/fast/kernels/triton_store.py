"""From the qkv projection to attention in one kernel: queries and keys normalised and rotated, keys and values stored
in their slots of the cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.execution.gpu.triton_elementwise import gained, wait
from common.models.layers import RMSNorm

# pyright: basic

FEW_TOKENS, FEW_HEADS, HEADS = 128, 8, 16
"""Heads of a program: with up to 128 tokens half as many, which end sooner; with four, a thousand tokens take twice as
long, since programs begin one after another."""


@triton.jit
def rotate_and_store_kernel(
    qkv, keys, values, slots, q_gain, k_gain, cos, sin, num_q, num_kv, eps, token_stride, angle_stride, slot_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for HEADS heads of one token; both halves of a head are read before either is written."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, DIM // 2)[None, :]
    heads = num_q + 2 * num_kv
    is_query, is_value, exists = head < num_q, head >= num_q + num_kv, head < heads
    dtype: tl.constexpr = qkv.dtype.element_ty
    place = tl.load(slots + token) * slot_stride  # written before the step began
    wait(PDL)
    at = qkv + token * token_stride + head * DIM + column
    given_low = tl.load(at, mask=exists, other=0.0)
    given_high = tl.load(at + DIM // 2, mask=exists, other=0.0)
    c = tl.load(cos + token * angle_stride + column).to(tl.float32)
    s = tl.load(sin + token * angle_stride + DIM // 2 + column).to(tl.float32)  # the half without a sign
    low, high = given_low.to(tl.float32), given_high.to(tl.float32)
    if NORM:
        mean_square = (tl.sum(low * low, 1, keep_dims=True) + tl.sum(high * high, 1, keep_dims=True)) / DIM
        scale = tl.rsqrt(mean_square + eps)
        low = gained(low * scale, is_query, q_gain + column, k_gain + column, column < DIM, dtype)
        column_high = column + DIM // 2
        high = gained(high * scale, is_query, q_gain + column_high, k_gain + column_high, column < DIM, dtype)
    turned_low, turned_high = (low * c - high * s).to(dtype), (high * c + low * s).to(dtype)
    tl.store(at, turned_low, mask=is_query)
    tl.store(at + DIM // 2, turned_high, mask=is_query)
    key_at, is_key = keys + place + (head - num_q) * DIM + column, (head >= num_q) & (head < num_q + num_kv)
    tl.store(key_at, turned_low, mask=is_key)
    tl.store(key_at + DIM // 2, turned_high, mask=is_key)
    value_at = values + place + (head - num_q - num_kv) * DIM + column
    tl.store(value_at, given_low, mask=is_value & exists)
    tl.store(value_at + DIM // 2, given_high, mask=is_value & exists)


def rotate_and_store(
    qkv: torch.Tensor, norms: tuple[RMSNorm, RMSNorm] | None, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor,
    slots: torch.Tensor, launch: dict[str, Any],
) -> None:  # fmt: skip
    """qkv [T, Hq + 2 Hkv, D]: queries normalised and rotated in place; keys, likewise, and values into their slots of
    one layer's kv. norms: of queries and keys. cos and signed sin [T, 1, D]."""
    tokens, heads, dim = qkv.shape
    num_kv = kv.shape[3]
    q_gain, k_gain, eps = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
    each = FEW_HEADS if tokens <= FEW_TOKENS else HEADS
    kernel: Any = rotate_and_store_kernel[(tokens, triton.cdiv(heads, each))]
    kernel(
        qkv, kv[0], kv[1], slots, q_gain, k_gain, cos, sin, heads - 2 * num_kv, num_kv, eps, qkv.stride(0),
        cos.stride(0), kv.stride(2), HEADS=each, DIM=dim, NORM=norms is not None, num_warps=4, **launch,
    )  # fmt: skip
