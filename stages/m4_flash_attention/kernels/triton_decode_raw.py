"""Decodes of a few sequences in one launch, from heads as the model's projection gives them.

With a few tokens a kernel waits longer for the one in front than it computes. So one kernel does the work of three:
it normalises and rotates queries and keys, stores keys and values, and attends. And it takes no tensor cores, whose 16
rows for one query make every tile a long chain of operations: a program serves one query head and multiplies and adds.
That reads K and V once for every head of a group, from the cache of the GPU all but the first time.

The newest token is not read back from the cache. All others were stored by earlier steps, so that the first tile is on
its way before the kernel in front has ended.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.launch import launch_options
from common.models.layers import RMSNorm
from stages.m4_flash_attention.kernels.triton_config import raw_config
from stages.m4_flash_attention.kernels.triton_parts import (
    Workspace,
    find_part,
    leave_part,
    merge_parts,
    processors,
    room,
)

# pyright: basic

MOST_SEQUENCES = 4
"""More of them keep the GPU busy, and are read sooner once for a whole group (`triton_decode`)."""
PROGRAMS_PER_PROCESSOR = 4
MERGED = 4096
"""Numbers of the parts' sums that are put together at a time."""
LOG2E = 1.4426950408889634


@triton.jit
def rotated(head, gain, cos, sin, eps, width, DIM: tl.constexpr, NORM: tl.constexpr):
    """One head [DIM], normalised where the model does that, turned by cos and signed sin. width: DIM, or 0 for zeros."""
    column = tl.arange(0, DIM)
    other = (column + DIM // 2) % DIM  # what a dimension turns together with
    dtype: tl.constexpr = head.dtype.element_ty
    value = tl.load(head + column, mask=column < width, other=0.0).to(tl.float32)
    partner = tl.load(head + other, mask=column < width, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(value * value, 0) / DIM + eps)
        value = (tl.load(gain + column).to(tl.float32) * (value * factor).to(dtype).to(tl.float32)).to(dtype)
        partner = (tl.load(gain + other).to(tl.float32) * (partner * factor).to(dtype).to(tl.float32)).to(dtype)
    turned = value.to(tl.float32) * tl.load(cos + column) + partner.to(tl.float32) * tl.load(sin + column)
    return turned.to(dtype)


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
def attend_tile(query, key, value, valid, scale, top, weight, sums):
    """One more tile of the context: the online softmax of FlashAttention. query, sums: float32 [DIM]."""
    scores = tl.sum(key.to(tl.float32) * query[None, :], 1) * scale
    scores = tl.where(valid, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 0))
    weights = tl.exp2(scores - new_top)
    shrink = tl.exp2(top - new_top)
    weight = weight * shrink + tl.sum(weights, 0)
    sums = sums * shrink + tl.sum(value.to(tl.float32) * weights[:, None], 0)
    return new_top, weight, sums


@triton.jit(do_not_specialize=["num_seqs", "table_stride"], do_not_specialize_on_alignment=["tables", "seq_lens"])
def raw_decode_kernel(
    qkv, keys, values, tables, seq_lens, slots, q_gain, k_gain, cos, sin, out, part_sums, part_weights, part_tops,
    arrived, scale, eps, num_seqs, qkv_stride, table_stride, block_stride, slot_stride, angle_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SEQS: tl.constexpr, TARGET: tl.constexpr, AT_ONCE: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    head, heads = tl.program_id(0), tl.num_programs(0)
    index = tl.arange(0, SEQS)
    lengths = tl.load(seq_lens + index, mask=index < num_seqs, other=0)  # stand there since the step began
    rows = (index < num_seqs).to(tl.int32)
    sequence, part, count, tiles, first_part = find_part(rows, tl.cdiv(lengths, TILE), tl.program_id(1), TARGET)
    if sequence >= num_seqs:
        return
    length = tl.load(seq_lens + sequence)
    first = part * tiles * TILE
    last = tl.minimum(first + tiles * TILE, length - 1)
    kv_head, column = head // GROUP, tl.arange(0, DIM)
    table = tables + sequence * table_stride
    keys += kv_head * DIM
    values += kv_head * DIM
    key, value, valid = load_tile(keys, values, table, first, last, block_stride, slot_stride, DIM, BLOCK, TILE)
    slot = tl.load(slots + sequence) * slot_stride + column
    cos += sequence * angle_stride
    sin += sequence * angle_stride
    if EARLY:
        gdc_wait()

    qkv += sequence.to(tl.int64) * qkv_stride
    query = rotated(qkv + head * DIM, q_gain, cos, sin, eps, DIM, DIM, NORM).to(tl.float32)
    newest = (part == count - 1) & (length > 0)  # a padding row has no tokens
    new_at = qkv + (heads + kv_head) * DIM
    width = tl.where(newest, DIM, 0)
    new_key = rotated(new_at, k_gain, cos, sin, eps, width, DIM, NORM)
    new_value = tl.load(new_at + KV_HEADS * DIM + column, mask=column < width, other=0.0)
    stores = column < tl.where(head % GROUP == 0, width, 0)
    tl.store(keys + slot, new_key, mask=stores)
    tl.store(values + slot, new_value, mask=stores)
    top = tl.where(newest, tl.sum(query * new_key.to(tl.float32), 0) * scale, -1e30)
    weight = newest.to(tl.float32)
    top, weight, sums = attend_tile(query, key, value, valid, scale, top, weight, new_value.to(tl.float32))
    for start in range(first + TILE, last, TILE):
        key, value, valid = load_tile(keys, values, table, start, last, block_stride, slot_stride, DIM, BLOCK, TILE)
        top, weight, sums = attend_tile(query, key, value, valid, scale, top, weight, sums)

    out += (sequence.to(tl.int64) * heads + head) * DIM + column
    if count == 1:
        tl.store(out, (sums / tl.where(weight > 0, weight, 1.0)).to(out.dtype.element_ty))
    else:
        before = leave_part(
            sums[None, :], weight, top, part_sums, part_weights, part_tops, arrived, first_part, part, head, heads, 1,
            1, DIM,
        )  # fmt: skip
        if before == count - 1:
            merged, total = merge_parts(
                part_sums, part_weights, part_tops, arrived, first_part, count, head, heads, 1, 1, DIM, AT_ONCE
            )
            tl.store(out[None, :], (merged / total[:, None]).to(out.dtype.element_ty))


class RawDecodeKernel:
    """The kernel, and the place for its parts."""

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = raw_config(head_dim, dtype)
        self._launch = launch_options(device)
        target = max(1, processors(device) * PROGRAMS_PER_PROCESSOR // num_heads)
        self.workspace = Workspace(target, num_heads, 1, head_dim, device)

    def __call__(
        self,
        qkv: torch.Tensor,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [B, Hq + 2 Hkv, D] (rows may lie apart), the norms of queries and keys, cos and signed sin [B, 1, D], kv
        one layer [2, N, block_size, Hkv, D], slots [B], tables [B, M], seq_lens [B]; returns [B, Hq, D]."""
        batch, total, dim = qkv.shape
        block_size, kv_heads = kv.shape[2], kv.shape[3]
        heads, target = total - 2 * kv_heads, self.workspace.target
        out = torch.empty(batch, heads, dim, dtype=qkv.dtype, device=qkv.device)
        q_gain, k_gain, eps = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
        kernel: Any = raw_decode_kernel[(heads, target + batch)]
        kernel(
            qkv, kv[0], kv[1], tables, seq_lens, slots, q_gain, k_gain, cos, sin, out, *self.workspace.tensors(),
            dim**-0.5 * LOG2E, eps, batch, qkv.stride(0), tables.stride(0), kv.stride(1), kv.stride(2), cos.stride(0),
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, BLOCK=block_size, SEQS=room(batch), TARGET=target,
            AT_ONCE=max(1, MERGED // dim), NORM=norms is not None, **self.config, **self._launch,
        )  # fmt: skip
        return out
