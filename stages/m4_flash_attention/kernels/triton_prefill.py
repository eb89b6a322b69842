"""FlashAttention-2's forward pass over a paged cache, for chunks at any offset of sequences of any length.

A program computes one tile of one sequence's queries for one head. Keys before the tile's first query are seen by
all of its rows, so those tiles (almost all of the work) need no mask at all; only the diagonal does.

Where a sequence begins stands on the device only, so that a CUDA graph can be captured for so many tokens, whosever
they are. T tokens of B sequences have at most T // ROWS + B tiles, and so many programs there are: the tiles of
sequence s are numbered from query_starts[s] // ROWS + s on, which leaves each at least as many numbers as it has tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from stages.m4_flash_attention.kernels.triton_config import prefill_config

# pyright: basic

LOG2E = 1.4426950408889634


VARYING = ["tables", "seq_lens", "query_starts"]
"""Slices of the step's tensors: a kernel for each of their alignments would be compiled in the middle of a run."""


@triton.jit
def attend_tiles(
    sums, weight, top, queries, query_position, keys, values, table, first, last, length, scale, block_stride,
    slot_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys first ... last - 1, tile by tile."""
    column = tl.arange(0, DIM)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        if DIAGONAL:
            stored = position < length  # what lies behind the end is not ours, perhaps not even a number
            block = tl.load(table + position // BLOCK, mask=stored, other=0).to(tl.int64)
        else:
            block = tl.load(table + position // BLOCK).to(tl.int64)
        at = block * block_stride + (position % BLOCK) * slot_stride
        if DIAGONAL:
            key = tl.load(keys + at[None, :] + column[:, None], mask=stored[None, :], other=0.0)
            value = tl.load(values + at[:, None] + column[None, :], mask=stored[:, None], other=0.0)
        else:
            key = tl.load(keys + at[None, :] + column[:, None])
            value = tl.load(values + at[:, None] + column[None, :])
        scores = tl.dot(queries, key, input_precision=PRECISION) * scale
        if DIAGONAL:
            scores = tl.where(position[None, :] <= query_position[:, None], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return sums, weight, top


@triton.jit
def find_tile(query_starts, number, num_seqs, ROWS: tl.constexpr):
    """Whose tile has this number, and which of its tiles it is: the last sequence whose numbers begin at or before."""
    origin = tl.load(query_starts)
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first = (tl.load(query_starts + middle) - origin) // ROWS + middle
        low = tl.where(first <= number, middle, low)
        high = tl.where(first <= number, high, middle)
    return low, number - (tl.load(query_starts + low) - origin) // ROWS - low


@triton.jit(do_not_specialize=["table_stride", "num_seqs"], do_not_specialize_on_alignment=VARYING)
def prefill_kernel(
    q, keys, values, tables, seq_lens, query_starts, out, scale, num_seqs, q_stride, out_stride, table_stride,
    block_stride, slot_stride, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)  # the last queries have the longest context: they go first
    sequence, tile = find_tile(query_starts, number, num_seqs, ROWS)
    query_start = tl.load(query_starts + sequence)
    query_length = tl.load(query_starts + sequence + 1) - query_start
    if tile * ROWS >= query_length:
        return
    length = tl.load(seq_lens + sequence)

    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    token = (query_start + row).to(tl.int64)
    real = row < query_length
    queries = tl.load(q + token[:, None] * q_stride + head * DIM + column[None, :], mask=real[:, None], other=0.0)
    oldest = length - query_length + tile * ROWS  # the position of the tile's first query
    position = oldest + tl.arange(0, ROWS)

    keys += head // GROUP * DIM
    values += head // GROUP * DIM
    table = tables + sequence * table_stride
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    seen_by_all = (oldest + 1) // TILE * TILE
    end = tl.minimum(oldest + ROWS, length)
    sums, weight, top = attend_tiles(
        sums, weight, top, queries, position, keys, values, table, 0, seen_by_all, length, scale, block_stride,
        slot_stride, DIM, BLOCK, TILE, False, PRECISION,
    )  # fmt: skip
    sums, weight, top = attend_tiles(
        sums, weight, top, queries, position, keys, values, table, seen_by_all, end, length, scale, block_stride,
        slot_stride, DIM, BLOCK, TILE, True, PRECISION,
    )  # fmt: skip
    result = (sums / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * out_stride + head * DIM + column[None, :], result, mask=real[:, None])


def prefill(
    q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor, query_starts: torch.Tensor,
    num_tokens: int, out: torch.Tensor, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """q and out [T, Hq, D] (rows may lie apart); query_starts [B + 1] counts in q's rows; kv is one layer's.
    num_tokens: so many queries the sequences have together, or more."""
    heads, dim = q.shape[1], q.shape[2]
    config = config or prefill_config(dim, q.dtype, num_tokens, heads)
    num_seqs = seq_lens.shape[0]
    grid = (heads, num_tokens // config["ROWS"] + num_seqs)
    kernel: Any = prefill_kernel[grid]
    kernel(
        q, kv[0], kv[1], tables, seq_lens, query_starts, out, dim**-0.5 * LOG2E, num_seqs, q.stride(0),
        out.stride(0), tables.stride(0), kv.stride(1), kv.stride(2), GROUP=heads // kv.shape[3], DIM=dim,
        BLOCK=kv.shape[2], PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
