"""The kernels between the matrix products on a CPU: each tensor is read once and written once, in one call.

PyTorch takes seven calls for a norm. With few tokens what counts is their number, not what they compute: a call takes
microseconds, a row of 576 numbers a fraction of one. The definitions are `RMSNorm`, `swiglu` and `rotate` of
`common.models.layers`; sums are in float32, and a value is rounded to the model's dtype wherever they round it.
Arrays are read as in `simd`, and x, gate_up and out come as addresses; `lanes` is a `simd.width` that divides a row.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.simd import (
    LANES,
    at_address,
    largest,
    load,
    multiply,
    multiply_add,
    scale,
    silu,
    store,
    total,
    width,
    zeros,
)

# pyright: basic

LANE_WIDTH = width(LANES)


@compiled()
def norm_row(x, at, weight, eps, size, lanes, out, to):
    """out[to ...] = weight * x[at ...] / root mean square; both may be the same."""
    step = 16 * len(lanes)
    squares = zeros(lanes)
    for i in range(0, size, step):
        value = load(x, at + i, lanes)
        squares = multiply_add(value, value, squares)
    factor = np.float32(1.0) / np.sqrt(total(squares) / np.float32(size) + np.float32(eps))
    for i in range(0, size, step):
        store(out, to + i, scale(factor, load(x, at + i, lanes)))
        store(out, to + i, multiply(load(weight, i, lanes), load(out, to + i, lanes)))


@compiled()
def norm(x, weight, eps, first, end, size, lanes, out):
    """Rows first ... end - 1 of x and out, [T, size]."""
    x, out = at_address(x, weight), at_address(out, weight)
    for row in range(first, end):
        norm_row(x, row * size, weight, eps, size, lanes, out, row * size)


@compiled()
def swiglu(gate_up, like, first, end, size, lanes, out):
    """Rows first ... end - 1: gate_up [T, 2 * size], out [T, size], both in the format of the array `like`."""
    gate_up, out = at_address(gate_up, like), at_address(out, like)
    for row in range(first, end):
        gate, up, to = 2 * row * size, (2 * row + 1) * size, row * size
        for i in range(0, size, 16 * len(lanes)):
            store(out, to + i, silu(load(gate_up, gate + i, lanes)))
            store(out, to + i, multiply(load(out, to + i, lanes), load(gate_up, up + i, lanes)))


@compiled()
def rotate_row(heads, at, cos, sin, angle, lanes, scratch):
    """Turn one head in place: dimension i together with dimension i + D / 2; lanes: of D / 2. scratch: [D] of the same
    format."""
    half = 16 * len(lanes)
    for i in range(0, 2 * half, half):
        store(scratch, i, multiply(load(heads, at + i, lanes), load(cos, angle + i, lanes)))
    other = load(heads, at, lanes)
    first = multiply_add(load(heads, at + half, lanes), load(sin, angle, lanes), load(scratch, 0, lanes))
    store(heads, at + half, multiply_add(other, load(sin, angle + half, lanes), load(scratch, half, lanes)))
    store(heads, at, first)


@compiled(parallel=True)
def norm_in_threads(x, weight, eps, rows, size, lanes, threads, out):
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        norm(x, weight, eps, thread * share, min(rows, (thread + 1) * share), size, lanes, out)


@compiled(parallel=True)
def swiglu_in_threads(gate_up, like, rows, size, lanes, threads, out):
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        swiglu(gate_up, like, thread * share, min(rows, (thread + 1) * share), size, lanes, out)


@compiled(parallel=True)
def argmax(x, like, rows, size, lanes, threads, out):
    """out [rows], int64: where the first of the largest numbers of each row of x [rows, size] is."""
    x, step = at_address(x, like), 16 * len(lanes)
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        few = np.empty(LANES, np.float32)
        for row in range(thread * share, min(rows, (thread + 1) * share)):
            begin, best = row * size, largest(load(x, row * size, lanes))
            for i in range(row * size, (row + 1) * size, step):
                here = largest(load(x, i, lanes))
                if here > best:
                    begin, best = i, here
            last = begin + step - LANES  # where numbers are no numbers, none may be as large
            while begin < last and largest(load(x, begin, LANE_WIDTH)) < best:
                begin += LANES
            store(few, 0, load(x, begin, LANE_WIDTH))
            out[row] = begin - row * size + np.argmax(few)
