"""Rows, tokens and warps of the Triton kernels: tables, to be set from measurements.

Those of the tiles were the fastest of some tried on each shape of Qwen3-0.6B. Those of the matrix-vector kernel were
the fastest of some tried in a whole decode step of it on an H100, where kernels that wait for each other share the
registers; no record was kept.
"""

from __future__ import annotations

Config = dict[str, int]

GEMV_TOKENS = 2
"""Up to this many tokens are multiplied one after the other, the weight in registers; more are faster as tiles."""
DEQUANTIZE_TOKENS = 256
"""From this many tokens on, writing the weight out in 16 bits costs less than our matrix product loses to cuBLAS."""

GEMV: dict[tuple[int, int], Config] = {  # inputs and outputs up to: rows of a program (16 or 32), warps
    (1024, 1024): {"ROWS": 16, "WARPS": 4},
    (1024, 1 << 30): {"ROWS": 32, "WARPS": 4},
    (2048, 1 << 30): {"ROWS": 32, "WARPS": 8},
    (4096, 1 << 30): {"ROWS": 16, "WARPS": 8},
}
MOST_INPUTS = 4096
"""Unpacked, the rows of a program must find room in the registers of its threads."""
TILES: dict[int, Config] = {  # tokens up to
    16: {"TOKENS": 16, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    32: {"TOKENS": 32, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    64: {"TOKENS": 64, "ROWS": 64, "num_warps": 4, "num_stages": 3},
    1 << 30: {"TOKENS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 3},
}


def gemv_config(in_features: int, out_features: int) -> Config:
    return next(c for (inputs, outputs), c in GEMV.items() if in_features <= inputs and out_features <= outputs)


def tiles_config(tokens: int) -> Config:
    return next(c for limit, c in TILES.items() if tokens <= limit)
