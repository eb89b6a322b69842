"""Prefill on a CPU: FlashAttention-2's loop, built on one register-tiled matrix product.

A task is one tile of queries of one KV head: `ROWS` rows, a row being one (query, head of the group), so that the
heads that share K and V share their tiles too. The inner product keeps 4 rows x 64 columns of sums in registers, for
Q K^T (columns are tokens; the tile of K is turned once for all rows) and for P V (columns are dimensions). On a CPU
that multiplies pairs of bfloat16, a model of that format has its tiles, and P, in pairs: twice the products at a time.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.simd import (
    LANES,
    LOG2E,
    add_product,
    at_address,
    exp2_minus,
    keep_first,
    largest,
    load,
    packed,
    scale,
    store,
    store_zipped,
    total,
    width,
    zeros,
)

# pyright: basic

ROWS = 192  # times D floats of queries and of acc: both stay in the L2 cache
TILE = 64  # tokens: a tile of K and one of V stay in the L1 cache
TILE_WIDTH, LANE_WIDTH = width(TILE), width(LANES)


@compiled()
def _locate(table, block_size, position, heads, head, dim):
    """Where a token's row begins in K and in V."""
    slot = np.int64(table[position // block_size]) * block_size + position % block_size
    return (slot * heads + head) * dim


@compiled()
def _pack(keys, values, table, block_size, first, count, heads, head, row_width, raw, turned, plain):
    """A tile of K as [D, TILE] and one of V as [TILE, D]; tokens past `count` are 0. Pairs are of neighbours in D for
    K, of neighbours in TILE for V."""
    dim, pair = 16 * len(row_width), packed(raw)
    size, step = dim // pair, 16 // pair
    for t in range(0, TILE, pair):
        value = other = zeros(row_width)
        if t < count:
            at = _locate(table, block_size, first + t, heads, head, dim)
            store(raw, t * size, load(keys, at, row_width))
            value = load(values, at, row_width)
        else:
            store(raw, t * size, zeros(row_width))
        if pair == 2 and t + 1 < count:
            at = _locate(table, block_size, first + t + 1, heads, head, dim)
            store(raw, (t + 1) * size, load(keys, at, row_width))
            other = load(values, at, row_width)
        elif pair == 2:
            store(raw, (t + 1) * size, zeros(row_width))
        store_zipped(plain, t // pair * dim, value, other)
    for d in range(0, size, step):
        for t in range(TILE):
            for i in range(step):
                turned[(d + i) * TILE + t] = raw[t * size + d + i]


@compiled()
def _softmax_row(scores, row, factor, count, masked, r, m, fresh, shrink, p):
    """One row of scores becomes weights, summed in fresh; shrink: log2 of what its older sums must be multiplied by."""
    tile = load(scores, row * TILE, TILE_WIDTH)
    if packed(p) == 2:  # pairs: their queries are as they came
        tile = scale(factor, tile)
    if masked:
        tile = keep_first(tile, count)
    high = max(m[r], largest(tile))
    tile = exp2_minus(tile, high)
    shrink[row], fresh[row], m[r] = m[r] - high, total(tile), high
    store(p, row * (TILE // packed(p)), tile)


@compiled()
def _four_rows(
    q, turned, plain, r, dim, column_width, scores, p, factor, counts, masked, m, l, acc, shrink, fresh
):  # fmt: skip
    """Rows r ... r + 3 against one tile: scores, softmax, sums over V."""
    columns, size, tokens = 16 * len(column_width), dim // packed(q), TILE // packed(p)
    a, b, c, d = zeros(TILE_WIDTH), zeros(TILE_WIDTH), zeros(TILE_WIDTH), zeros(TILE_WIDTH)
    for k in range(size):
        key = load(turned, k * TILE, TILE_WIDTH)
        a, b = add_product(q[r * size + k], key, a), add_product(q[(r + 1) * size + k], key, b)
        c, d = add_product(q[(r + 2) * size + k], key, c), add_product(q[(r + 3) * size + k], key, d)
    store(scores, 0, a)
    store(scores, TILE, b)
    store(scores, 2 * TILE, c)
    store(scores, 3 * TILE, d)
    for row in range(4):
        _softmax_row(scores, row, factor, counts[r + row], masked, r + row, m, fresh, shrink, p)
    store(shrink, 0, exp2_minus(load(shrink, 0, LANE_WIDTH), np.float32(0.0)))
    for row in range(4):
        l[r + row] = l[r + row] * shrink[row] + fresh[row]
    for column in range(0, dim, columns):
        at = r * dim + column
        w = scale(shrink[0], load(acc, at, column_width))
        x = scale(shrink[1], load(acc, at + dim, column_width))
        y = scale(shrink[2], load(acc, at + 2 * dim, column_width))
        z = scale(shrink[3], load(acc, at + 3 * dim, column_width))
        for t in range(tokens):
            value = load(plain, t * dim + column, column_width)
            w, x = add_product(p[t], value, w), add_product(p[tokens + t], value, x)
            y, z = add_product(p[2 * tokens + t], value, y), add_product(p[3 * tokens + t], value, z)
        store(acc, at, w)
        store(acc, at + dim, x)
        store(acc, at + 2 * dim, y)
        store(acc, at + 3 * dim, z)


@compiled(parallel=True)
def prefill(
    q, q_stride, keys, values, tables, seq_lens, query_starts, tasks, block_size, heads, group, row_width, column_width,
    threads, number, out,
):  # fmt: skip
    """Causal attention of each sequence's last tokens over its whole context.

    q and out are addresses: q's token t begins at t * q_stride; keys and values as in `decode`; out: [T, Hq, D];
    query_starts [B + 1]; tasks [N, 3]: sequence, KV head, first query of the tile (within the sequence), every
    `threads`-th of one thread; column_width: of at most 64, dividing D; number: an array whose dtype says what is
    multiplied: float32, or uint32 for pairs of bfloat16.
    """
    q, out = at_address(q, keys), at_address(out, keys)
    dim, all_heads = 16 * len(row_width), heads * group
    tile_queries = max(1, ROWS // group)
    most_rows = (tile_queries * group + 3) // 4 * 4
    pair = packed(number)
    factor = np.float32(LOG2E / np.sqrt(dim))
    for thread in prange(threads):
        queries, acc = np.zeros(most_rows * dim // pair, number.dtype), np.zeros(most_rows * dim, np.float32)
        m, l = np.zeros(most_rows, np.float32), np.zeros(most_rows, np.float32)
        counts = np.zeros(most_rows, np.int64)
        tile_size = TILE * dim // pair
        raw, turned = np.zeros(tile_size, number.dtype), np.zeros(tile_size, number.dtype)
        plain = np.zeros(tile_size, number.dtype)
        scores, p = np.zeros(4 * TILE, np.float32), np.zeros(4 * TILE // pair, number.dtype)
        shrink, fresh = np.zeros(LANES, np.float32), np.zeros(4, np.float32)
        for index in range(thread, tasks.shape[0], threads):
            sequence, head, begin = np.int64(tasks[index, 0]), np.int64(tasks[index, 1]), np.int64(tasks[index, 2])
            token = np.int64(query_starts[sequence])
            length = np.int64(query_starts[sequence + 1]) - token
            rows = min(tile_queries, length - begin) * group
            oldest = np.int64(seq_lens[sequence]) - length + begin  # position of the tile's first query
            context = oldest + rows // group
            for r in range(rows):
                at = (token + begin + r // group) * q_stride + (head * group + r % group) * dim
                query = load(q, at, row_width)
                store(queries, r * dim // pair, query if pair == 2 else scale(factor, query))
            acc[:], l[:], m[:] = np.float32(0.0), np.float32(0.0), np.float32(-1e30)
            for first in range(0, context, TILE):
                count = min(TILE, context - first)
                _pack(keys, values, tables[sequence], block_size, first, count, heads, head, row_width,
                      raw, turned, plain)  # fmt: skip
                masked = first + TILE > oldest + 1  # only tiles that some query may not see to the end
                # Rows before the diagonal see nothing of this tile: skip them, four at a time.
                skip = max(0, (first - oldest) * group) // 4 * 4
                for r in range(rows):
                    counts[r] = oldest + r // group + 1 - first
                for r in range(skip, rows, 4):
                    _four_rows(queries, turned, plain, r, dim, column_width, scores, p, factor, counts, masked,
                               m, l, acc, shrink, fresh)  # fmt: skip
            for r in range(rows):
                at = ((token + begin + r // group) * all_heads + head * group + r % group) * dim
                store(out, at, scale(np.float32(1.0) / l[r], load(acc, r * dim, row_width)))
