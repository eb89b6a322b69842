"""The decode of one sequence in one launch, from heads as the model's projection gives them.

With one token a kernel waits longer for the one in front than it computes. So this one does the work of three: it
normalises and rotates queries and keys, stores keys and values, and attends. And what does not depend on the newest
token it does before the wait: all other keys and values were stored by earlier steps, and those of the first AHEAD
tiles then lie in shared memory as the tensor cores want them. Behind the wait each warp multiplies 16 positions of a
tile by all queries of a KV head, with a softmax of its own, so that warps meet only at the end, to add up.

The programs of a KV head share out the values' columns: each computes all scores, and waits for nobody. Parts of the
context, which somebody must merge, cost more than that, and are for contexts of more than AHEAD tiles.

The newest token is not read back from the cache: the first warp of the last part begins with it.
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
    leave_part,
    merge_parts,
    processors,
)

# pyright: basic

PROGRAMS_PER_PROCESSOR = 4
MERGED = 1024
"""Numbers of the parts' sums that are put together at a time."""
LOG2E = 1.4426950408889634


@triton.jit
def rotated(heads, gain, other_gain, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """The heads [N, DIM] that begin at pointers [N, 1], normalised where the model does that, and turned by cos and
    signed sin. Each lies in one warp: nothing here needs a barrier."""
    column = tl.arange(0, DIM)[None, :]
    other = (column + DIM // 2) % DIM  # what a dimension turns together with
    dtype: tl.constexpr = heads.dtype.element_ty
    value = tl.load(heads + column).to(tl.float32)
    partner = tl.load(heads + other).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
        value = (gain * (value * factor).to(dtype).to(tl.float32)).to(dtype)
        partner = (other_gain * (partner * factor).to(dtype).to(tl.float32)).to(dtype)
    turned = value.to(tl.float32) * tl.load(cos + column) + partner.to(tl.float32) * tl.load(sin + column)
    return turned.to(dtype)


@triton.jit
def load_tile(
    keys, values, table, start, last, block_stride, slot_stride, DIM: tl.constexpr, SLICE: tl.constexpr,
    BLOCK: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Of the positions from start on, 16 for each warp: keys [WARPS, 16, DIM], values [WARPS, SLICE, 16], and which
    [WARPS, 16] lie before `last`."""
    tl.assume(start >= 0)  # saves the division below what negative numbers would need
    position = start + tl.arange(0, WARPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    valid = position < last
    block = tl.load(table + position // BLOCK, mask=valid, other=0).to(tl.int64)
    at = block * block_stride + (position % BLOCK) * slot_stride
    key = tl.load(keys + at[:, :, None] + tl.arange(0, DIM)[None, None, :], mask=valid[:, :, None], other=0.0)
    value = tl.load(values + at[:, None, :] + tl.arange(0, SLICE)[None, :, None], mask=valid[:, None, :], other=0.0)
    return key, value, valid


@triton.jit
def attend_tiles(queries, keys, values, valid, scale, top, weight, sums, PRECISION: tl.constexpr):
    """A few more tiles of the context: the online softmax of FlashAttention, in each warp for itself.
    queries [WARPS, DIM, COLUMNS], a column for each; top, weight [WARPS, COLUMNS], sums [WARPS, SLICE, COLUMNS]."""
    scores = ()
    best = tl.full([queries.shape[0], 16, queries.shape[2]], -1e30, tl.float32)
    for tile in tl.static_range(len(keys)):
        score = tl.dot(keys[tile], queries, input_precision=PRECISION) * scale
        score = tl.where(valid[tile][:, :, None], score, -float("inf"))
        best = tl.maximum(best, score)
        scores = scores + (score,)  # noqa: RUF005
    new_top = tl.maximum(top, tl.max(best, 1))
    shrink = tl.exp2(top - new_top)
    sums *= shrink[:, None, :]
    several = tl.zeros_like(best)
    for tile in tl.static_range(len(keys)):
        weights = tl.exp2(scores[tile] - new_top[:, None, :])
        several += weights
        value = values[tile]
        sums = tl.dot(value, weights.to(value.dtype), sums, input_precision=PRECISION)
    return new_top, weight * shrink + tl.sum(several, 1), sums


@triton.jit
def add_weights(top, weight, other_top, other_weight):
    """Two sums of weights as one, and the maximum that it is relative to."""
    new_top = tl.maximum(top, other_top)
    return new_top, weight * tl.exp2(top - new_top) + other_weight * tl.exp2(other_top - new_top)


@triton.jit(do_not_specialize_on_alignment=["table", "seq_len"])
def raw_decode_kernel(
    qkv, keys, values, table, seq_len, slot, q_gain, k_gain, cos, sin, out, part_sums, part_weights, part_tops,
    arrived, scale, eps, block_stride, slot_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr, DIM: tl.constexpr,
    SLICE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr, AT_ONCE: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for each KV head, SLICE of its values' columns, and part of the context. A part is AHEAD tiles, or as
    few more as there are programs for."""
    if EARLY:
        gdc_launch_dependents()
    TILE: tl.constexpr = 16 * WARPS
    SLICES: tl.constexpr = DIM // SLICE
    head, heads = tl.program_id(0), tl.num_programs(0)  # a slice is like a head to those who merge
    part, parts = tl.program_id(1), tl.num_programs(1)
    length = tl.load(seq_len)  # stands there since the step began
    share = tl.maximum(tl.cdiv(tl.cdiv(length, TILE), parts), AHEAD) * TILE
    count = tl.cdiv(length, share)
    if part >= count:
        return
    newest = part == count - 1
    first = part * share
    last = tl.minimum(first + share, length - 1)
    kv_head, first_column = head // SLICES, head % SLICES * SLICE
    row, column, lane = tl.arange(0, COLUMNS), tl.arange(0, DIM), tl.arange(0, SLICE)
    keys += kv_head * DIM
    values += kv_head * DIM + first_column
    tiles_keys, tiles_values, tiles_valid = (), (), ()
    for tile in tl.static_range(AHEAD):
        key, value, valid = load_tile(
            keys, values, table, first + tile * TILE, last, block_stride, slot_stride, DIM, SLICE, BLOCK, WARPS
        )
        tiles_keys = tiles_keys + (key,)  # noqa: RUF005
        tiles_values = tiles_values + (value,)  # noqa: RUF005
        tiles_valid = tiles_valid + (valid,)  # noqa: RUF005
    place = tl.load(slot) * slot_stride
    other = (column + DIM // 2) % DIM
    q_gains, q_others, k_gains, k_others = 0.0, 0.0, 0.0, 0.0
    if NORM:
        q_gains = tl.load(q_gain + column).to(tl.float32)[None, :]
        q_others = tl.load(q_gain + other).to(tl.float32)[None, :]
        k_gains = tl.load(k_gain + column).to(tl.float32)[None, :]
        k_others = tl.load(k_gain + other).to(tl.float32)[None, :]
    query_at = qkv + (kv_head * GROUP + tl.minimum(row, GROUP - 1))[:, None] * DIM  # the last as often as there is room
    key_at = qkv + (KV_HEADS * GROUP + kv_head + row * 0)[:, None] * DIM  # for each query, so that it is in its warp
    value_at = qkv + (KV_HEADS * (GROUP + 1) + kv_head) * DIM + first_column + lane
    if EARLY:  # noqa: SIM102
        if length > 0:  # always, but the compiler would move a wait without a branch up, ahead of the loads
            gdc_wait()

    new_value = tl.load(value_at)
    query = rotated(query_at, q_gains, q_others, cos, sin, eps, DIM, NORM)
    new_key = rotated(key_at, k_gains, k_others, cos, sin, eps, DIM, NORM)
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale
    queries = tl.broadcast_to(tl.trans(query)[None, :, :], (WARPS, DIM, COLUMNS))
    here = ((tl.arange(0, WARPS) == 0) & newest)[:, None]
    top = tl.where(here, new_score[None, :], -1e30)
    weight = tl.where(here, tl.full([WARPS, COLUMNS], 1.0, tl.float32), 0.0)
    sums = tl.where(here[:, :, None], new_value.to(tl.float32)[None, :, None], tl.zeros([1, 1, COLUMNS], tl.float32))
    key_stores = tl.where(newest & (first_column == 0), 1, 0)
    tl.store(keys + place + column[None, :] + row[:, None] * 0, new_key, mask=row[:, None] < key_stores)
    tl.store(values + place + lane, new_value, mask=lane < tl.where(newest, SLICE, 0))

    top, weight, sums = attend_tiles(
        queries, tiles_keys, tiles_values, tiles_valid, scale, top, weight, sums, PRECISION
    )
    for start in range(first + AHEAD * TILE, last, TILE):
        key, value, valid = load_tile(
            keys, values, table, start, last, block_stride, slot_stride, DIM, SLICE, BLOCK, WARPS
        )
        top, weight, sums = attend_tiles(queries, (key,), (value,), (valid,), scale, top, weight, sums, PRECISION)

    whole_top, whole = tl.reduce((top, weight), 0, add_weights)
    total = tl.sum(sums * tl.exp2(top - whole_top[None, :])[:, None, :], 0)  # [SLICE, COLUMNS]
    out += kv_head * GROUP * DIM + first_column
    if count == 1:
        result = (total * (1.0 / whole)[None, :]).to(out.dtype.element_ty)
        tl.store(out + row[None, :] * DIM + lane[:, None], result, mask=row[None, :] < GROUP)
    else:
        before = leave_part(
            tl.trans(total), whole, whole_top, part_sums, part_weights, part_tops, arrived, 0, part, head, heads,
            GROUP, COLUMNS, SLICE,
        )  # fmt: skip
        if before == count - 1:
            merged, total_weight = merge_parts(
                part_sums, part_weights, part_tops, arrived, 0, count, head, heads, GROUP, ROOM, SLICE, AT_ONCE
            )
            real = tl.arange(0, ROOM)[:, None]
            result = (merged / tl.where(total_weight > 0, total_weight, 1.0)[:, None]).to(out.dtype.element_ty)
            tl.store(out + real * DIM + lane[None, :], result, mask=real < GROUP)


class RawDecodeKernel:
    """The kernel, and the place for its parts."""

    def __init__(self, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = raw_config(head_dim, dtype)
        self._launch = launch_options(device)
        self.heads = kv_heads * (head_dim // self.config["SLICE"])
        self.group = num_heads // kv_heads
        self.parts = max(1, processors(device) * PROGRAMS_PER_PROCESSOR // self.heads)
        self.workspace = Workspace(self.parts, self.heads, self.group, self.config["SLICE"], device)

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
        out = torch.empty(1, kv_heads * self.group, dim, dtype=qkv.dtype, device=qkv.device)
        q_gain, k_gain, eps = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
        room, part_columns = triton.next_power_of_2(self.group), self.config["SLICE"]
        kernel: Any = raw_decode_kernel[(self.heads, self.parts)]
        kernel(
            qkv, kv[0], kv[1], table, seq_len, slot, q_gain, k_gain, cos, sin, out, *self.workspace.tensors(),
            dim**-0.5 * LOG2E, eps, kv.stride(1), kv.stride(2), KV_HEADS=kv_heads, GROUP=self.group,
            COLUMNS=max(8, room), ROOM=room, DIM=dim, BLOCK=block_size, WARPS=self.config["num_warps"],
            AT_ONCE=max(1, MERGED // (room * part_columns)), NORM=norms is not None,
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",  # means something in float32 only
            num_stages=1,  # the loop over later tiles gets no shared memory in advance
            **self.config, **self._launch,
        )  # fmt: skip
        return out
