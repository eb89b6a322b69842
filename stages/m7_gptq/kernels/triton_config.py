"""Rows, tokens and warps of the Triton kernels: tables, to be set from measurements.

Those of the tiles come from `python -m benchmarks int4 --tune`. Those of the matrix-vector kernel were
chosen by trial, alone and in a chain of layers, where each kernel starts beside the one in front.
"""

from __future__ import annotations

Config = dict[str, int]

GEMV_TOKENS = 2
"""Up to so many tokens are multiplied one after the other, with the weights in registers; more are faster as tiles."""
DEQUANTIZE_TOKENS = 256
"""From so many tokens on, writing the weight out in 16 bits costs less than our matrix product loses to cuBLAS."""

GEMV: dict[int, Config] = {  # inputs up to: rows of a program, warps
    1024: {"ROWS": 4, "WARPS": 2},
    2048: {"ROWS": 4, "WARPS": 8},
    1 << 30: {"ROWS": 8, "WARPS": 8},
}
TILES: dict[int, Config] = {  # tokens up to
    16: {"TOKENS": 16, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    32: {"TOKENS": 32, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    64: {"TOKENS": 64, "ROWS": 64, "num_warps": 4, "num_stages": 3},
    1 << 30: {"TOKENS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 3},
}


def gemv_config(in_features: int, out_features: int) -> Config:
    return next(config for limit, config in GEMV.items() if in_features <= limit)


def tiles_config(tokens: int) -> Config:
    return next(c for limit, c in TILES.items() if tokens <= limit)
