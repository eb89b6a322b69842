"""A matrix product in bfloat16 for a few rows, on a CPU that has no instructions for it.

Decoding waits for the weights, so each is read from memory once for all rows, widened in registers and multiplied in
float32. A thread takes `TILE` outputs at a time: their weights stay in the L2 cache while groups of `ROWS` rows pass
by, which stay in L1.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.simd import LANES, at_address, load, multiply_add, scale_add, store, total, width, zeros

# pyright: basic

TILE, ROWS = LANES, 4
LANE_WIDTH = width(LANES)


@compiled()
def _four_rows(x, r, weight, o, size, lanes, sums):
    """sums[row, o]: one output of four rows; its weights are widened once for all four."""
    a, b, c, d = zeros(lanes), zeros(lanes), zeros(lanes), zeros(lanes)
    at, row = o * size, r * size
    for i in range(0, size, 16 * len(lanes)):
        value = load(weight, at + i, lanes)
        a = multiply_add(value, load(x, row + i, lanes), a)
        b = multiply_add(value, load(x, row + size + i, lanes), b)
        c = multiply_add(value, load(x, row + 2 * size + i, lanes), c)
        d = multiply_add(value, load(x, row + 3 * size + i, lanes), d)
    to = r * TILE + o % TILE
    sums[to], sums[to + TILE], sums[to + 2 * TILE], sums[to + 3 * TILE] = total(a), total(b), total(c), total(d)


@compiled(parallel=True)
def linear(x, weight, bias, rows, outputs, size, lanes, threads, out):
    """out [rows, outputs] = x [rows, size] @ weight.T + bias; x and out: addresses.

    weight: [outputs, size], flat; bias: [outputs], or without numbers. outputs: a multiple of TILE; lanes: a
    `simd.width` that divides size.
    """
    x, out = at_address(x, weight), at_address(out, weight)
    padded = (rows + ROWS - 1) // ROWS * ROWS
    wide = np.zeros(padded * size, np.float32)
    for i in range(0, rows * size, 16 * len(lanes)):
        store(wide, i, load(x, i, lanes))
    tiles = outputs // TILE
    share = (tiles + threads - 1) // threads
    for thread in prange(threads):
        sums = np.empty(padded * TILE, np.float32)
        for tile in range(thread * share, min(tiles, (thread + 1) * share)):
            first = tile * TILE
            for r in range(0, rows, ROWS):
                for o in range(first, first + TILE):
                    _four_rows(wide, r, weight, o, size, lanes, sums)
            for r in range(rows):
                result = load(sums, r * TILE, LANE_WIDTH)
                if bias.size:
                    result = scale_add(np.float32(1.0), load(bias, first, LANE_WIDTH), result)
                store(out, r * outputs + first, result)
