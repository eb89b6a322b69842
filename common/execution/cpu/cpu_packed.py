"""`x @ weight.T` in bfloat16 for a weight in panels (`simd_products`), with what comes before and after it.

Few rows wait for the weight: each thread reads its own stretch of it, once. Many rows are taken in parts that stay in
the L2 cache while all panels of a thread pass by.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.cpu_elementwise import norm_row
from common.execution.cpu.simd import LANES, at_address, load, multiply, scale_add, silu, store, width
from common.execution.cpu.simd_products import BLOCKS, PANEL, bf16_panel, rows_at_once

# pyright: basic

CACHED = 1 << 19  # bytes of x that stay in a core's L2 cache
ALONE = 1 << 14  # up to so many numbers of x, each thread prepares all of them: those of another core come late
MOST = rows_at_once()
ONE, TWO, FOUR, SIX, EIGHT = (width(count * LANES) for count in (1, 2, 4, 6, 8))
LANE_WIDTH = width(LANES)


@compiled()
def row_parts(rows, row_bytes):
    """Rows of one part."""
    return min(rows, max(1, CACHED // (row_bytes * MOST)) * MOST)


@compiled()
def finish(sums, ups, count, row, panel, bias, outputs, gated, add, out):
    """out[row : row + count, panel's outputs] = sums [count, PANEL] + bias; gated: SiLU of that, times ups + bias; add:
    to what is there. bias: [outputs], or without numbers; with a gate [2 * outputs]."""
    for r in range(count):
        for j in range(BLOCKS):
            output, at = panel * PANEL + j * LANES, r * PANEL + j * LANES
            value = load(sums, at, LANE_WIDTH)
            if bias.size:
                value = scale_add(np.float32(1.0), load(bias, output, LANE_WIDTH), value)
            if gated:
                up = load(ups, at, LANE_WIDTH)
                if bias.size:
                    up = scale_add(np.float32(1.0), load(bias, outputs + output, LANE_WIDTH), up)
                value = multiply(silu(value), up)
            to = (row + r) * outputs + output
            if add:
                value = scale_add(np.float32(1.0), load(out, to, LANE_WIDTH), value)
            store(out, to, value)


@compiled()
def _some_rows(weight, panel, x, row, left, size, sums):
    """As many of the rows that are left as there is a product for; returns their number."""
    if MOST >= 8 and left >= 8:
        bf16_panel(weight, panel, x, row, size, EIGHT, sums)
        return 8
    if MOST >= 6 and left >= 6:
        bf16_panel(weight, panel, x, row, size, SIX, sums)
        return 6
    if MOST >= 4 and left >= 4:
        bf16_panel(weight, panel, x, row, size, FOUR, sums)
        return 4
    if left >= 2:
        bf16_panel(weight, panel, x, row, size, TWO, sums)
        return 2
    bf16_panel(weight, panel, x, row, size, ONE, sums)
    return 1


@compiled()
def _norm(x, weight, eps, first, end, size, lanes, out):
    for row in range(first, end):
        norm_row(x, row * size, weight, eps, size, lanes, out, row * size)


@compiled(parallel=True)
def _norm_in_threads(x, weight, eps, rows, size, lanes, threads, out):
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        _norm(x, weight, eps, thread * share, min(rows, (thread + 1) * share), size, lanes, out)


@compiled(parallel=True)
def linear(x, norm, eps, rows, outputs, gated, add, threads, out, bias, size, lanes, weight):
    """out [rows, outputs] = x [rows, size] @ weight.T + bias; x and out: addresses. See `finish` for the rest.

    norm [size]: of an RMSNorm that x goes through first, or without numbers, as bias. weight: as `bf16_panel` reads it,
    2 * outputs with a gate. lanes: a `simd.width` that divides size.
    """
    x, out = at_address(x, weight), at_address(out, weight)
    few = rows * size <= ALONE
    if norm.size and not few:
        normed = np.empty(rows * size, x.dtype)
        _norm_in_threads(x, norm, eps, rows, size, lanes, threads, normed)
        x = normed
    panels, part = outputs // PANEL, row_parts(rows, size * 2)
    share = (panels + threads - 1) // threads
    for thread in prange(threads):
        sums, ups, own = np.empty(MOST * PANEL, np.float32), np.empty(MOST * PANEL, np.float32), x
        if norm.size and few:
            own = np.empty(rows * size, x.dtype)
            _norm(x, norm, eps, 0, rows, size, lanes, own)
        for begin in range(0, rows, part):
            end = min(rows, begin + part)
            for panel in range(thread * share, min(panels, (thread + 1) * share)):
                row = begin
                while row < end:
                    count = _some_rows(weight, panel, own, row, end - row, size, sums)
                    if gated:
                        _some_rows(weight, panels + panel, own, row, end - row, size, ups)
                    finish(sums, ups, count, row, panel, bias, outputs, gated, add, out)
                    row += count
