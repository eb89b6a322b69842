"""What comes between the projection and attention, in one call on a CPU: norm of the heads, rotation, store."""

from __future__ import annotations

import numpy as np
from numba import prange

from common.execution.cpu.compiled import compiled
from common.execution.cpu.cpu_elementwise import norm_row, rotate_row
from common.execution.cpu.simd import at_address, load, store

# pyright: basic


@compiled()
def rotate_and_store(
    qkv, cos, sin, angle_stride, q_weight, k_weight, eps, slots, first, end, num_q, num_kv, row_width, half_width, keys,
    values,
):  # fmt: skip
    """Tokens first ... end - 1. Queries and keys are normalised (by weights [D]; without any where those have no
    numbers) and turned where they are; then keys and values go to their slots.

    qkv: the address of [T, num_q + 2 num_kv, D]; token t's cos and sin begin at t * angle_stride; slots: [T]; keys,
    values: one layer's [slots, num_kv, D]. row_width and half_width: `simd.width` of D and of D / 2.
    """
    qkv, dim = at_address(qkv, keys), 16 * len(row_width)
    token_size, row = (num_q + 2 * num_kv) * dim, num_kv * dim
    scratch = np.empty(dim, qkv.dtype)
    for t in range(first, end):
        for head in range(num_q + num_kv):
            at = t * token_size + head * dim
            weight = q_weight if head < num_q else k_weight
            if weight.size:
                norm_row(qkv, at, weight, eps, dim, row_width, qkv, at)
            rotate_row(qkv, at, cos, sin, t * angle_stride, half_width, scratch)
        key = t * token_size + num_q * dim
        to = np.int64(slots[t]) * row
        for offset in range(0, row, dim):
            store(keys, to + offset, load(qkv, key + offset, row_width))
            store(values, to + offset, load(qkv, key + row + offset, row_width))


@compiled(parallel=True)
def rotate_and_store_in_threads(
    qkv, cos, sin, angle_stride, q_weight, k_weight, eps, slots, tokens, num_q, num_kv, row_width, half_width, threads,
    keys, values,
):  # fmt: skip
    share = (tokens + threads - 1) // threads
    for thread in prange(threads):
        first, end = thread * share, min(tokens, (thread + 1) * share)
        rotate_and_store(
            qkv, cos, sin, angle_stride, q_weight, k_weight, eps, slots, first, end, num_q, num_kv, row_width,
            half_width, keys, values,
        )  # fmt: skip
