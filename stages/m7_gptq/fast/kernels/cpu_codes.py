"""`x @ weight.T` for a weight of codes: x is rounded to bytes first, each row in groups of `GROUP` numbers.

A group's scale is its largest number / 127, so that no rounding is further off than a 254th of that (LLM.int8(),
Dettmers et al. 2022, has one scale a row; llama.cpp's Q8_0 has these). The rest is `cpu_packed.linear`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.cpu_elementwise import norm_row
from common.execution.cpu.cpu_packed import ALONE, EIGHT, FOUR, MOST, ONE, SIX, TWO, finish, row_parts
from common.execution.cpu.simd import absolute, at_address, largest, load, nearest, scale, store, total, width
from common.execution.cpu.simd_products import PANEL
from stages.m7_gptq.fast.kernels.simd_codes import CENTRE, GROUP, codes_panel

# pyright: basic

GROUP_WIDTH = width(GROUP)
CENTRE_4, CENTRE_8 = CENTRE[4], CENTRE[8]


@compiled()
def _quantize_row(x, at, size, centre, codes, corrections, scales, row):
    groups = size // GROUP
    for group in range(groups):
        values = load(x, at + group * GROUP, GROUP_WIDTH)
        most = largest(absolute(values))
        step = most / np.float32(127.0)
        values = nearest(scale(np.float32(1.0) / step if most > 0 else np.float32(0.0), values))
        store(codes, row * size + group * GROUP, values)
        scales[row * groups + group] = step
        corrections[row * groups + group] = -centre * np.int32(total(values))


@compiled()
def _quantize(x, norm, eps, first, end, size, lanes, centre, codes, corrections, scales):
    normed = np.empty(size, x.dtype)
    for row in range(first, end):
        if norm.size:
            norm_row(x, row * size, norm, eps, size, lanes, normed, 0)
            _quantize_row(normed, 0, size, centre, codes, corrections, scales, row)
        else:
            _quantize_row(x, row * size, size, centre, codes, corrections, scales, row)


@compiled(parallel=True)
def _quantize_in_threads(x, norm, eps, rows, size, lanes, centre, threads, codes, corrections, scales):
    share = (rows + threads - 1) // threads
    for thread in prange(threads):
        first, end = thread * share, min(rows, (thread + 1) * share)
        _quantize(x, norm, eps, first, end, size, lanes, centre, codes, corrections, scales)


@compiled()
def _some_rows(weight, bits, panel, groups, x, row, left, sums):
    """As many of the rows that are left as there is a product for; returns their number."""
    if MOST >= 8 and left >= 8:
        codes_panel(weight, bits, panel, groups, x, row, EIGHT, sums)
        return 8
    if MOST >= 6 and left >= 6:
        codes_panel(weight, bits, panel, groups, x, row, SIX, sums)
        return 6
    if MOST >= 4 and left >= 4:
        codes_panel(weight, bits, panel, groups, x, row, FOUR, sums)
        return 4
    if left >= 2:
        codes_panel(weight, bits, panel, groups, x, row, TWO, sums)
        return 2
    codes_panel(weight, bits, panel, groups, x, row, ONE, sums)
    return 1


@compiled(parallel=True)
def linear(
    x, norm, eps, rows, outputs, gated, add, threads, out, bias, size, lanes, codes, offsets, factors, per, bits
):  # fmt: skip
    """out [rows, outputs] = x [rows, size] @ weight.T + bias; x and out: addresses of bfloat16.

    codes, offsets, factors, per, bits: as `codes_panel` reads them. The others: as in `cpu_packed.linear`.
    """
    x, out = at_address(x, bias), at_address(out, bias)
    groups = size // GROUP
    centre, few = np.int32(CENTRE_4 if len(bits) == 4 else CENTRE_8), rows * size <= ALONE
    shared = 0 if few else rows
    numbers, scales = np.empty(shared * size, np.int8), np.empty(shared * groups, np.float32)
    corrections = np.empty(shared * groups, np.int32)
    if not few:
        _quantize_in_threads(x, norm, eps, rows, size, lanes, centre, threads, numbers, corrections, scales)
    panels, part = outputs // PANEL, row_parts(rows, size)
    share = (panels + threads - 1) // threads
    for thread in prange(threads):
        sums, ups = np.empty(MOST * PANEL, np.float32), np.empty(MOST * PANEL, np.float32)
        mine, own_corrections, own_scales = numbers, corrections, scales
        if few:
            mine, own_scales = np.empty(rows * size, np.int8), np.empty(rows * groups, np.float32)
            own_corrections = np.empty(rows * groups, np.int32)
            _quantize(x, norm, eps, 0, rows, size, lanes, centre, mine, own_corrections, own_scales)
        quantized, weight = (mine, own_corrections, own_scales), (codes, offsets, factors, per)
        for begin in range(0, rows, part):
            end = min(rows, begin + part)
            for panel in range(thread * share, min(panels, (thread + 1) * share)):
                row = begin
                while row < end:
                    count = _some_rows(weight, bits, panel, groups, quantized, row, end - row, sums)
                    if gated:
                        _some_rows(weight, bits, panels + panel, groups, quantized, row, end - row, ups)
                    finish(sums, ups, count, row, panel, bias, outputs, gated, add, out)
                    row += count
