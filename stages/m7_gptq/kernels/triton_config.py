"""Rows, tokens, warps and splits of the Triton kernels: tables, to be set from measurements
(`python -m benchmarks int4 --tune`)."""

from __future__ import annotations

Config = dict[str, int]

GEMV_TOKENS = 2
"""Up to so many tokens, each reads the weight by itself (from the second on, out of the L2 cache)."""
DEQUANTIZE_TOKENS = 256
"""From so many tokens on, writing the weight out in 16 bits costs less than our matrix product loses to cuBLAS."""

GEMV: dict[int, Config] = {  # outputs up to: rows of a program, warps that share each row
    2048: {"ROWS": 2, "WARPS": 2},
    4096: {"ROWS": 4, "WARPS": 1},
    1 << 30: {"ROWS": 4, "WARPS": 1},
}
TILES: dict[int, Config] = {  # tokens up to
    16: {"TOKENS": 16, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    32: {"TOKENS": 32, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    64: {"TOKENS": 64, "ROWS": 64, "num_warps": 4, "num_stages": 3},
    1 << 30: {"TOKENS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 3},
}


def gemv_config(in_features: int, out_features: int) -> Config:
    """A row is read by as many warps as it has 128 words for, at most."""
    config = next(c for limit, c in GEMV.items() if out_features <= limit)
    return config | {"WARPS": min(config["WARPS"], max(1, in_features // 1024))}


def tiles_config(tokens: int) -> Config:
    return next(c for limit, c in TILES.items() if tokens <= limit)
