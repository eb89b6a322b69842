"""Decode on a CPU: one query token a sequence, K and V read where they lie, each row once for all heads that share it.

A decode step does two multiplications for every number that it reads, so only the stream of K and V counts. Hence the
loop order: tokens outside, heads inside, so that a block is read from its first byte to its last, while the next one is
on its way. Work is shared in equal *tokens*: the contexts of all sequences are laid end to end and each thread takes
one stretch. At most the first and the last sequence of a stretch are cut; their parts are joined at the end.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.simd import (
    LANES,
    LOG2E,
    at_address,
    dot,
    exp2_minus,
    keep_first,
    largest,
    load,
    prefetch,
    scale,
    scale_add,
    store,
    total,
    width,
    zeros,
)

# pyright: basic

TILE = 16
TILE_WIDTH, LANE_WIDTH = width(TILE), width(LANES)
CACHE_LINE = 64


@compiled()
def _locate(table, block_size, first, count, row, at):
    """at[t]: where token `first + t` begins in K and in V."""
    for t in range(count):
        position = first + t
        at[t] = (np.int64(table[position // block_size]) * block_size + position % block_size) * row


@compiled()
def _attend_range(q, query, keys, values, table, block_size, first, last, heads, group, row_width, out, m, l):
    """One sequence's tokens first ... last - 1: sums over V go to out [Hq, D], maxima and denominators to m, l [Hq]."""
    dim = 16 * len(row_width)
    row = heads * dim
    factor = np.float32(LOG2E / np.sqrt(dim))  # scores in units of log 2: exp2 is cheaper than exp
    line = CACHE_LINE // keys.itemsize
    scores = np.zeros(group * TILE, np.float32)
    padded_group = (group + LANES - 1) // LANES * LANES
    shrink, l_here = np.zeros(padded_group, np.float32), np.zeros(padded_group, np.float32)
    at, ahead = np.zeros(TILE, np.int64), np.zeros(TILE, np.int64)
    m[:], l[:], out[:] = np.float32(-1e30), np.float32(0.0), np.float32(0.0)
    queries = np.empty(out.size, np.float32)
    for j in range(heads * group):
        store(queries, j * dim, scale(factor, load(q, query + j * dim, row_width)))
    _locate(table, block_size, first, min(TILE, last - first), row, ahead)
    for start in range(first, last, TILE):
        count, coming = min(TILE, last - start), min(TILE, last - start - TILE)
        at, ahead = ahead, at
        _locate(table, block_size, start + TILE, coming, row, ahead)
        for head in range(heads):
            for t in range(count):
                for offset in range(head * dim, (head + 1) * dim, line):
                    prefetch(keys, ahead[t] + offset)
                    prefetch(values, ahead[t] + offset)
                key = load(keys, at[t] + head * dim, row_width)
                for g in range(group):
                    scores[g * TILE + t] = dot(load(queries, (head * group + g) * dim, row_width), key)
            for g in range(group):
                j = head * group + g
                tile = load(scores, g * TILE, TILE_WIDTH)
                if count < TILE:
                    tile = keep_first(tile, count)
                high = max(m[j], largest(tile))
                tile = exp2_minus(tile, high)
                shrink[g], m[j] = m[j] - high, high
                l_here[g] = total(tile)
                store(scores, g * TILE, tile)
            for g in range(0, group, LANES):
                store(shrink, g, exp2_minus(load(shrink, g, LANE_WIDTH), np.float32(0.0)))
            for g in range(group):
                l[head * group + g] = l[head * group + g] * shrink[g] + l_here[g]
            for g in range(0, group - 1, 2):  # two heads at a time: enough sums in flight to hide the latency
                j = head * group + g
                one = scale(shrink[g], load(out, j * dim, row_width))
                two = scale(shrink[g + 1], load(out, (j + 1) * dim, row_width))
                for t in range(count):
                    value = load(values, at[t] + head * dim, row_width)
                    one = scale_add(scores[g * TILE + t], value, one)
                    two = scale_add(scores[(g + 1) * TILE + t], value, two)
                store(out, j * dim, one)
                store(out, (j + 1) * dim, two)
            if group % 2:
                j = head * group + group - 1
                one = scale(shrink[group - 1], load(out, j * dim, row_width))
                for t in range(count):
                    value = load(values, at[t] + head * dim, row_width)
                    one = scale_add(scores[(group - 1) * TILE + t], value, one)
                store(out, j * dim, one)


@compiled()
def _divide(acc, l, dim, row_width, out, begin):
    for j in range(l.size):
        share = np.float32(1.0) / l[j] if l[j] > 0 else np.float32(0.0)
        store(out, begin + j * dim, scale(share, load(acc, j * dim, row_width)))


@compiled()
def _join(owner, acc, ms, ls, dim, row_width, out):
    """Parts of one sequence are neighbours; bring them to one maximum and add them up."""
    parts, heads = ms.shape
    part = 0
    while part < parts:
        sequence, begin = owner[part], part
        part += 1
        if sequence < 0:
            continue
        while part < parts and (owner[part] == sequence or owner[part] < 0):
            if owner[part] == sequence:
                for j in range(heads):
                    high = max(ms[begin, j], ms[part, j])
                    old, new = np.exp2(ms[begin, j] - high), np.exp2(ms[part, j] - high)
                    both = scale(old, load(acc[begin], j * dim, row_width))
                    store(acc[begin], j * dim, scale_add(new, load(acc[part], j * dim, row_width), both))
                    ms[begin, j], ls[begin, j] = high, ls[begin, j] * old + ls[part, j] * new
            part += 1
        _divide(acc[begin], ls[begin], dim, row_width, out, sequence * heads * dim)


@compiled(parallel=True)
def decode(q, q_stride, keys, values, tables, seq_lens, block_size, heads, group, row_width, threads, out):
    """Attention of B query tokens, one a sequence.

    q and out are addresses: q's row b begins at b * q_stride, out is [B, Hq, D]; keys, values: one layer's
    [num_blocks, block_size, heads, D], flat; tables [B, M] and seq_lens [B]: int32; row_width = width(D). A sequence
    without tokens gets 0.
    """
    q, out = at_address(q, keys), at_address(out, keys)
    batch, dim, all_heads = seq_lens.size, 16 * len(row_width), heads * group
    share = (np.int64(seq_lens.sum()) + threads - 1) // threads
    owner = np.full(2 * threads, -1, np.int64)
    acc = np.empty((2 * threads, all_heads * dim), np.float32)
    ms, ls = np.empty((2 * threads, all_heads), np.float32), np.empty((2 * threads, all_heads), np.float32)
    for thread in prange(threads):
        begin, end, offset = thread * share, (thread + 1) * share, np.int64(0)
        whole = np.empty(all_heads * dim, np.float32)
        m, l = np.empty(all_heads, np.float32), np.empty(all_heads, np.float32)
        for b in range(batch):
            length = np.int64(seq_lens[b])
            first, last = max(0, begin - offset), min(length, end - offset)
            offset += length
            if first >= last:
                if length == 0 and thread == 0:
                    for j in range(all_heads):
                        store(out, (b * all_heads + j) * dim, zeros(row_width))
                continue
            if first == 0 and last == length:
                _attend_range(q, b * q_stride, keys, values, tables[b], block_size, first, last, heads, group,
                              row_width, whole, m, l)  # fmt: skip
                _divide(whole, l, dim, row_width, out, b * all_heads * dim)
            else:
                part = 2 * thread + (first == 0)
                owner[part] = b
                _attend_range(q, b * q_stride, keys, values, tables[b], block_size, first, last, heads, group,
                              row_width, acc[part], ms[part], ls[part])  # fmt: skip
    _join(owner, acc, ms, ls, dim, row_width, out)
