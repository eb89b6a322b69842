"""The decode of one sequence in one launch, straight from the qkv projection.

With one token a kernel waits longer for the one in front than it computes. So this one does the work of three: it
normalises and rotates queries and keys, stores keys and values, and attends. It takes no tensor cores, whose 16 rows
for one query make every tile a long chain of operations. K and V are read once for each head of a group, from the
GPU's cache all but the first time.

The newest token is not read back from the cache. All others were stored by earlier steps, so that the first tile is on
its way before the kernel in front has ended.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.launch import launch_options
from common.models.layers import RMSNorm
from stages.m4_flash_attention.fast.kernels.triton_config import FUSED_QKV, choose
from stages.m4_flash_attention.fast.kernels.triton_parts import Workspace, leave_part, merge_parts, num_sms

# pyright: basic

PROGRAMS_PER_SM = 4
MERGED = 1024
"""How many numbers of the parts' acc are merged at a time."""
LOG2E = 1.4426950408889634


@triton.jit
def pair(head, column, width, DIM: tl.constexpr):
    """One head [DIM], and what each dimension turns together with. width: DIM, or 0: zeros."""
    mask = column < width
    own = tl.load(head + column, mask=mask, other=0.0)
    return own, tl.load(head + (column + DIM // 2) % DIM, mask=mask, other=0.0)


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def normalised(value, factor, gain):
    dtype: tl.constexpr = value.dtype
    return (gain.to(tl.float32) * (value.to(tl.float32) * factor).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def turned(own, partner, cos, sin):
    return (own.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(own.dtype)


@triton.jit
def load_tile(
    keys, values, table, start, last, block_stride, slot_stride, DIM: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, DIM] of the positions from start on, and which of them lie before `last`."""
    tl.assume(start >= 0)  # saves the division below what negative numbers would need
    position = start + tl.arange(0, TILE)
    valid = position < last
    block = tl.load(table + position // BLOCK, mask=valid, other=0).to(tl.int64)
    at = (block * block_stride + (position % BLOCK) * slot_stride)[:, None] + tl.arange(0, DIM)[None, :]
    key = tl.load(keys + at, mask=valid[:, None], other=0.0)
    value = tl.load(values + at, mask=valid[:, None], other=0.0)
    return key, value, valid


@triton.jit
def attend_tile(query, key, value, valid, scale, m, l, acc):
    """One more tile of the context: the online softmax of FlashAttention. query, acc: float32 [DIM]."""
    scores = tl.sum(key.to(tl.float32) * query[None, :], 1) * scale
    scores = tl.where(valid, scores, -float("inf"))
    m_new = tl.maximum(m, tl.max(scores, 0))
    p = tl.exp2(scores - m_new)
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 0)
    acc = acc * shrink + tl.sum(value.to(tl.float32) * p[:, None], 0)
    return m_new, l, acc


@triton.jit(do_not_specialize_on_alignment=["table", "seq_len"])
def fused_qkv_decode_kernel(
    qkv, keys, values, table, seq_len, slot, q_gain, k_gain, cos, sin, out, part_acc, part_l, part_m,
    arrived, scale, eps, block_stride, slot_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    AT_ONCE: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each query head and part of the context; parts are as few tiles as there are programs for."""
    if PDL:
        gdc_launch_dependents()
    head, heads = tl.program_id(0), tl.num_programs(0)
    part, parts = tl.program_id(1), tl.num_programs(1)
    length = tl.load(seq_len)  # written before the step began
    tiles = tl.cdiv(tl.cdiv(length, TILE), parts)
    count = tl.cdiv(length, tiles * TILE)
    if part >= count:
        return
    first = part * tiles * TILE
    last = tl.minimum(first + tiles * TILE, length - 1)
    kv_head, column = head // GROUP, tl.arange(0, DIM)
    keys += kv_head * DIM
    values += kv_head * DIM
    key, value, valid = load_tile(keys, values, table, first, last, block_stride, slot_stride, DIM, BLOCK, TILE)
    place = tl.load(slot) * slot_stride + column
    newest = part == count - 1
    width = tl.where(newest, DIM, 0)
    new_at = qkv + (heads + kv_head) * DIM
    if NORM:
        q_gains, k_gains = pair(q_gain, column, DIM, DIM), pair(k_gain, column, DIM, DIM)
    if PDL:
        gdc_wait()

    # Everything is loaded in front of the first sum over threads: behind it each load would be waited for again.
    q, q_partner = pair(qkv + head * DIM, column, DIM, DIM)
    k, k_partner = pair(new_at, column, width, DIM)
    new_value = tl.load(new_at + KV_HEADS * DIM + column, mask=column < width, other=0.0)
    turn, signed_turn = tl.load(cos + column), tl.load(sin + column)
    if NORM:
        wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
        squares = tl.reduce((wide_q * wide_q, wide_k * wide_k), 0, add_both)
        q_factor, k_factor = tl.rsqrt(squares[0] / DIM + eps), tl.rsqrt(squares[1] / DIM + eps)
        q, q_partner = normalised(q, q_factor, q_gains[0]), normalised(q_partner, q_factor, q_gains[1])
        k, k_partner = normalised(k, k_factor, k_gains[0]), normalised(k_partner, k_factor, k_gains[1])
    query = turned(q, q_partner, turn, signed_turn).to(tl.float32)
    new_key = turned(k, k_partner, turn, signed_turn)
    stores = column < tl.where(head % GROUP == 0, width, 0)
    tl.store(keys + place, new_key, mask=stores)
    tl.store(values + place, new_value, mask=stores)
    m = tl.where(newest, tl.sum(query * new_key.to(tl.float32), 0) * scale, -1e30)
    l = newest.to(tl.float32)
    m, l, acc = attend_tile(query, key, value, valid, scale, m, l, new_value.to(tl.float32))
    for start in range(first + TILE, last, TILE):
        key, value, valid = load_tile(keys, values, table, start, last, block_stride, slot_stride, DIM, BLOCK, TILE)
        m, l, acc = attend_tile(query, key, value, valid, scale, m, l, acc)

    out += head * DIM + column
    if count == 1:
        tl.store(out, (acc / l).to(out.dtype.element_ty))
    else:
        before = leave_part(acc[None, :], l, m, part_acc, part_l, part_m, arrived, 0, part, head, heads, 1, 1, DIM)
        if before == count - 1:
            merged, total = merge_parts(part_acc, part_l, part_m, arrived, 0, count, head, heads, 1, 1, DIM, AT_ONCE)
            tl.store(out[None, :], (merged / total[:, None]).to(out.dtype.element_ty))


class FusedQkvDecodeKernel:
    """The kernel, and the place for its parts."""

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = choose(FUSED_QKV, head_dim, dtype)
        self._launch = launch_options(device)
        self.parts = max(1, num_sms(device) * PROGRAMS_PER_SM // num_heads)
        self.workspace = Workspace(self.parts, num_heads, 1, head_dim, device)

    def __call__(
        self,
        qkv: torch.Tensor,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot: torch.Tensor,
        table: torch.Tensor,
        seq_len: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [1, Hq + 2 Hkv, D], the norms of queries and keys, cos and signed sin [1, 1, D], kv one layer
        [2, N, block_size, Hkv, D], slot [1], table [1, M], seq_len [1], at least 1; returns [1, Hq, D]."""
        dim, block_size, kv_heads = qkv.shape[2], kv.shape[2], kv.shape[3]
        heads = qkv.shape[1] - 2 * kv_heads
        out = torch.empty(1, heads, dim, dtype=qkv.dtype, device=qkv.device)
        q_gain, k_gain, eps = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
        kernel: Any = fused_qkv_decode_kernel[(heads, self.parts)]
        kernel(
            qkv, kv[0], kv[1], table, seq_len, slot, q_gain, k_gain, cos, sin, out, *self.workspace.tensors(),
            dim**-0.5 * LOG2E, eps, kv.stride(1), kv.stride(2), KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim,
            BLOCK=block_size, AT_ONCE=max(1, MERGED // dim), NORM=norms is not None, **self.config, **self._launch,
        )  # fmt: skip
        return out
