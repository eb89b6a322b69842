"""FlashAttention-2's forward pass over a paged cache, for chunks at any offset of sequences of any length.

A program computes one tile of one sequence's queries for one head. Keys before the tile's first query are seen by
all of its rows, so only the tiles on the diagonal mask their scores. The numbers of a tile's blocks are loaded one tile
ahead: K and V, whose addresses follow from them, are then copied while the tiles before are computed. Where the queries
are too few to fill the GPU, a program goes through a part of the context only (`triton_parts`).

Where a sequence begins is known on the device only, so a CUDA graph serves all steps with T tokens in B sequences. T
tokens of B sequences have at most T // ROWS + B tiles of queries, in at most `TARGET` more parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.launch import launch_options
from stages.m4_flash_attention.fast.kernels.triton_config import prefill_config
from stages.m4_flash_attention.fast.kernels.triton_parts import Workspace, find_part, finish, num_sms, padded_count

# pyright: basic

PROGRAMS_PER_SM = 2
SMALLEST_PART = 8
"""Tiles of K and V in the smallest part: to merge a smaller one takes longer than to compute it."""
LOG2E = 1.4426950408889634


VARYING = ["tables", "seq_lens", "query_starts"]
"""Slices of the step's tensors: a kernel for each of their alignments would be compiled in the middle of a run."""


@triton.jit
def add_tile(acc, l, m, scores, value, scale, PRECISION: tl.constexpr):
    """One step of the online softmax: a tile's scores and values."""
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    return tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION), l, m_new


@triton.jit
def attend_tiles(
    acc, l, m, queries, query_position, keys, values, table, first, last, length, scale, block_stride,
    slot_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys first ... last - 1, tile by tile, each masked: for decodes, whose programs are many and small."""
    column = tl.arange(0, DIM)
    for start in range(first, last, TILE):
        tl.assume(start >= 0)  # saves the division below what negative numbers would need
        position = start + tl.arange(0, TILE)
        stored = position < length  # what lies behind the end is not ours, perhaps not even a number
        block = tl.load(table + position // BLOCK, mask=stored, other=0).to(tl.int64)
        at = block * block_stride + (position % BLOCK) * slot_stride
        key = tl.load(keys + at[None, :] + column[:, None], mask=stored[None, :], other=0.0)
        value = tl.load(values + at[:, None] + column[None, :], mask=stored[:, None], other=0.0)
        scores = tl.dot(queries, key, input_precision=PRECISION)
        scores = tl.where(position[None, :] <= query_position[:, None], scores, -float("inf"))
        acc, l, m = add_tile(acc, l, m, scores, value, scale, PRECISION)
    return acc, l, m


@triton.jit
def load_blocks(table, start, last, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The block of each position start ... start + TILE - 1; 0 from `last` on. start: a multiple of TILE."""
    row = tl.arange(0, TILE)
    index = start // BLOCK + row // BLOCK if TILE % BLOCK == 0 else (start + row) // BLOCK
    block = tl.load(table + index, mask=start + row < last, other=0)
    return block.to(tl.int64)  # here, not in the loop: the compiled loop is a fifth shorter


@triton.jit
def attend_tiles_ahead(
    acc, l, m, queries, oldest, keys, values, table, first, last, scale, block_stride, slot_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys first ... last - 1 for the queries at oldest, oldest + 1, ...; blocks are loaded a tile ahead."""
    row, column = tl.arange(0, TILE), tl.arange(0, DIM)
    query_position = oldest + tl.arange(0, queries.shape[0])
    block = load_blocks(table, first, last, TILE, BLOCK)
    for start in range(first, last, TILE):
        tl.assume(start >= 0)  # saves the division what negative numbers would need
        inside = row % BLOCK if TILE % BLOCK == 0 else (start + row) % BLOCK
        at = (block * block_stride + inside * slot_stride)[:, None] + column[None, :]
        key = tl.load(keys + at)  # behind the end any number will do, as it is masked
        value = tl.load(values + at, mask=(start + row < last)[:, None], other=0.0)  # but no NaN
        block = load_blocks(table, start + TILE, last, TILE, BLOCK)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION)
        if start + TILE > oldest + 1:
            scores = tl.where(start + row[None, :] <= query_position[:, None], scores, -float("inf"))
        acc, l, m = add_tile(acc, l, m, scores, value, scale, PRECISION)
    return acc, l, m


@triton.jit(do_not_specialize=["table_stride", "num_seqs"], do_not_specialize_on_alignment=VARYING)
def prefill_kernel(
    q, keys, values, tables, seq_lens, query_starts, out, part_acc, part_l, part_m, arrived, scale, num_seqs,
    q_stride, out_stride, table_stride, block_stride: tl.constexpr, slot_stride: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEQS: tl.constexpr,
    TARGET: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    head, heads = tl.program_id(0), tl.num_programs(0)
    index = tl.arange(0, SEQS)
    given = index < num_seqs
    starts = tl.load(query_starts + index, mask=given, other=0)  # written before the step began, like the lengths
    ends = tl.load(query_starts + index + 1, mask=given, other=0)
    context = tl.load(seq_lens + index, mask=given, other=0)
    rows, number = tl.cdiv(ends - starts, ROWS), tl.program_id(1)
    if TARGET == 0:
        number = tl.sum(rows, 0) - 1 - number  # the last queries have the longest context: they go first
    sequence, part, cuts, parts, first_part = find_part(rows, tl.cdiv(context, PART * TILE), number, TARGET)
    if PDL:
        gdc_wait()
    if (number < 0) | (sequence >= num_seqs):
        return
    tile = part // cuts
    here = index == sequence
    query_start = tl.sum(tl.where(here, starts, 0), 0)
    query_length = tl.sum(tl.where(here, ends, 0), 0) - query_start
    length = tl.sum(tl.where(here, context, 0), 0)
    oldest = length - query_length + tile * ROWS  # the position of the tile's first query
    end = tl.minimum(oldest + ROWS, length)
    if TARGET > 0:
        first_part, part = first_part + tile * cuts, part % cuts
        size = parts * PART * TILE
        first = part * size
        last = tl.minimum(first + size, end)
        if first >= last:  # the tile's queries see no more than the parts in front of this one
            return
        count = tl.cdiv(end, size)
    else:
        first, last, count = 0, end, 1

    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    token = (query_start + row).to(tl.int64)
    real = row < query_length
    queries = tl.load(q + token[:, None] * q_stride + head * DIM + column[None, :], mask=real[:, None], other=0.0)

    keys += head // GROUP * DIM
    values += head // GROUP * DIM
    table = tables + sequence * table_stride
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    acc, l, m = attend_tiles_ahead(
        acc, l, m, queries, oldest, keys, values, table, first, last, scale, block_stride, slot_stride, DIM, BLOCK,
        TILE, PRECISION,
    )  # fmt: skip
    out += (query_start + tile * ROWS).to(tl.int64) * out_stride + head * DIM
    finish(
        acc, l, m, out, out_stride, query_length - tile * ROWS, part_acc, part_l, part_m, arrived, first_part, part,
        count, head, heads, ROWS, ROWS, ROWS, DIM, 1,
    )  # fmt: skip


class PrefillKernel:
    """The kernel, and the place for its parts."""

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.programs = num_sms(device) * PROGRAMS_PER_SM
        rows = max(prefill_config(head_dim, dtype, programs)["ROWS"] for programs in (0, 1 << 30))
        self.smallest_part, self._launch = SMALLEST_PART, launch_options(device)
        self.workspace = Workspace(max(1, self.programs // num_heads), num_heads, rows, head_dim, device)

    def __call__(
        self, q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
        query_starts: torch.Tensor, num_tokens: int, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """q and out [T, Hq, D] (rows may lie apart); query_starts [B + 1] counts in q's rows; kv is one layer's.
        num_tokens: at least as many as the sequences have queries together."""
        heads, dim = q.shape[1], q.shape[2]
        config, num_seqs = prefill_config(dim, q.dtype, num_tokens * heads), seq_lens.shape[0]
        # parts and their merging pay only where a quarter of the GPU would have nothing to do
        enough = 4 * num_tokens * heads >= 3 * self.programs * config["ROWS"]
        target = 0 if enough else self.workspace.target
        kernel: Any = prefill_kernel[(heads, num_tokens // config["ROWS"] + num_seqs + target)]
        kernel(
            q, kv[0], kv[1], tables, seq_lens, query_starts, out, *self.workspace.tensors(), dim**-0.5 * LOG2E,
            num_seqs, q.stride(0), out.stride(0), tables.stride(0), kv.stride(1), kv.stride(2),
            GROUP=heads // kv.shape[3], DIM=dim, BLOCK=kv.shape[2], SEQS=padded_count(num_seqs), TARGET=target,
            PART=self.smallest_part, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **config, **self._launch,
        )  # fmt: skip
