"""Flash-Decoding over a paged cache: one query token a sequence, each context cut into `num_splits` parts.

A program reads one part of one sequence's context for one KV head and serves all query heads that share it (they are
the rows of its matrix product, padded to the 16 rows that a tensor core wants: the arithmetic is free, the reading
is not). The lengths are read on the device and the grid does not depend on them, so one CUDA graph serves every step:
captured for the longest context, it has programs to spare for a short one, and those leave at once. `Parts.merge`
puts the parts together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from stages.m4_flash_attention.kernels.triton_config import DEFAULT_SPLITTING, Splitting, decode_config
from stages.m4_flash_attention.kernels.triton_merge import Parts

# pyright: basic

MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
LOG2E = 1.4426950408889634


VARYING = ["fair_splits", "num_splits", "table_stride"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["tables", "seq_lens"])
def decode_kernel(
    q, keys, values, tables, seq_lens, out, part_out, part_top, part_weight, scale, fair_splits, num_splits,
    q_stride, table_stride, block_stride, slot_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    LONG: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    tiles = tl.cdiv(length, TILE)  # each part gets whole ones: a fair share, or less of a context that is long
    share = tl.minimum(tl.cdiv(tiles, fair_splits), tl.maximum(tl.cdiv(tiles, num_splits), LONG)) * TILE
    first = split * share
    last = tl.minimum(first + share, length)
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    in_group = row < GROUP
    query_head = head * GROUP + row
    out_row = sequence.to(tl.int64) * (tl.num_programs(0) * GROUP) + query_head
    part = out_row * num_splits + split
    if SPLIT:  # noqa: SIM102 (the compiler knows one condition, the GPU the other)
        if first >= length:  # a context shorter than the one that the grid was made for
            tl.store(part_weight + part, tl.zeros([ROWS], tl.float32), mask=in_group)
            return

    q_at = sequence.to(tl.int64) * q_stride + query_head[:, None] * DIM + column[None, :]
    queries = tl.load(q + q_at, mask=in_group[:, None], other=0.0)

    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        valid = position < last
        block = tl.load(tables + sequence * table_stride + position // BLOCK, mask=valid, other=0).to(tl.int64)
        at = block * block_stride + (position % BLOCK) * slot_stride + head * DIM
        key = tl.load(keys + at[None, :] + column[:, None], mask=valid[None, :], other=0.0)  # [DIM, TILE]
        value = tl.load(values + at[:, None] + column[None, :], mask=valid[:, None], other=0.0)  # [TILE, DIM]
        scores = tl.dot(queries, key, input_precision=PRECISION) * scale
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top

    if SPLIT:
        tl.store(part_top + part, top, mask=in_group)
        tl.store(part_weight + part, weight, mask=in_group)
        tl.store(part_out + part[:, None] * DIM + column[None, :], sums, mask=in_group[:, None])
    else:
        result = sums / tl.where(weight > 0, weight, 1.0)[:, None]  # a padded row has no tokens: 0, not NaN
        result = result.to(out.dtype.element_ty)
        tl.store(out + out_row[:, None] * DIM + column[None, :], result, mask=in_group[:, None])


class DecodeKernel:
    """`programs`: how many programs fill the GPU. A batch that has fewer is split further, up to `MAX_SPLITS` parts a
    sequence; the rule looks at the batch's size and at `max_seq_len`, never at a length on the device."""

    def __init__(
        self, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, processors: int,
        splitting: Splitting = DEFAULT_SPLITTING,
    ) -> None:  # fmt: skip
        self.config = decode_config(head_dim, dtype)
        self.programs = processors * PROGRAMS_PER_SM
        self._grid, self._long_tiles = splitting.decode_grid, -(-splitting.long_part // self.config["TILE"])
        self.parts_needed = self._grid * max(self.programs, num_kv_heads) * group

    def num_splits(self, batch_size: int, num_kv_heads: int, max_seq_len: int) -> tuple[int, int]:
        """Into how many parts each context is cut, and how many parts there may be of a long one."""
        wanted = self.programs // (batch_size * num_kv_heads)
        tiles = -(-max_seq_len // self.config["TILE"])
        fair = max(1, min(wanted, MAX_SPLITS, tiles))
        most = min(self._grid * self.programs // (batch_size * num_kv_heads), MAX_SPLITS, -(-tiles // self._long_tiles))
        return fair, max(fair, most)

    def __call__(
        self, q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor, max_seq_len: int,
        out: torch.Tensor, parts: Parts,
    ) -> None:  # fmt: skip
        """q [B, Hq, D] (rows may lie apart), kv one layer [2, N, block_size, Hkv, D], out [B, Hq, D] contiguous."""
        batch, heads, dim = q.shape
        block_size, kv_heads = kv.shape[2], kv.shape[3]
        group = heads // kv_heads
        fair, splits = self.num_splits(batch, kv_heads, max_seq_len)
        precision = "ieee" if q.dtype == torch.float32 else "tf32"  # means something in float32 only
        kernel: Any = decode_kernel[(kv_heads, batch, splits)]
        kernel(
            q, kv[0], kv[1], tables, seq_lens, out, parts.sums, parts.tops, parts.weights, dim**-0.5 * LOG2E, fair,
            splits, q.stride(0), tables.stride(0), kv.stride(1), kv.stride(2),
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, BLOCK=block_size,
            LONG=self._long_tiles, SPLIT=splits > 1, PRECISION=precision, **self.config,
        )  # fmt: skip
        if splits > 1:
            parts.merge(out, splits)
