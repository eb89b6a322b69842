"""Tile sizes, warps and pipeline stages, by head dimension and format: a table, set from measurements on Hopper GPUs.

TILE: tokens of K and V at a time; ROWS: queries at a time. A float32 tile is twice as large and leaves room for fewer.
"""

from __future__ import annotations

import torch

Config = dict[str, int]

DECODE: dict[tuple[int, int], Config] = {  # (head_dim up to, bytes of a number)
    (64, 2): {"TILE": 128, "num_warps": 4, "num_stages": 4},
    (128, 2): {"TILE": 64, "num_warps": 2, "num_stages": 3},
    (256, 2): {"TILE": 32, "num_warps": 4, "num_stages": 3},
    (64, 4): {"TILE": 64, "num_warps": 4, "num_stages": 2},
    (128, 4): {"TILE": 32, "num_warps": 4, "num_stages": 2},
    (256, 4): {"TILE": 16, "num_warps": 4, "num_stages": 2},
}
MANY: dict[tuple[int, int], Config] = {
    **DECODE,
    (128, 2): {"TILE": 32, "num_warps": 1, "num_stages": 4, "PER_SM": 8},
}
"""For decodes of many sequences: small programs, of which one ends and makes room while others compute."""
MANY_SEQUENCES = 48
PREFILL: dict[tuple[int, int], Config] = {
    (64, 2): {"ROWS": 64, "TILE": 128, "num_warps": 4, "num_stages": 3},
    (128, 2): {"ROWS": 128, "TILE": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128},
    (256, 2): {"ROWS": 64, "TILE": 64, "num_warps": 8, "num_stages": 2},
    (64, 4): {"ROWS": 64, "TILE": 32, "num_warps": 4, "num_stages": 2},
    (128, 4): {"ROWS": 32, "TILE": 32, "num_warps": 4, "num_stages": 2},
    (256, 4): {"ROWS": 16, "TILE": 32, "num_warps": 4, "num_stages": 2},
}
FEW: dict[tuple[int, int], Config] = {
    **PREFILL,
    (128, 2): {"ROWS": 64, "TILE": 64, "num_warps": 4, "num_stages": 3},
}
"""For fewer queries: narrower tiles, so that the last programs are short. In both, two programs fit on a processor at a
time: one computes scores' exponentials while the other multiplies."""
FUSED_QKV: dict[tuple[int, int], Config] = {
    (64, 2): {"TILE": 256, "num_warps": 4},
    (128, 2): {"TILE": 256, "num_warps": 8},
    (256, 2): {"TILE": 64, "num_warps": 4},
    (64, 4): {"TILE": 128, "num_warps": 4},
    (128, 4): {"TILE": 64, "num_warps": 4},
    (256, 4): {"TILE": 32, "num_warps": 4},
}
ENOUGH_QUERIES = 196_608
"""Of all heads together: 1,536 tiles of 128. With fewer the largest tiles are left over at the end, alone."""


def choose(table: dict[tuple[int, int], Config], head_dim: int, dtype: torch.dtype) -> Config:
    return next(config for (limit, size), config in table.items() if head_dim <= limit and size == dtype.itemsize)


def decode_config(head_dim: int, dtype: torch.dtype, sequences: int) -> Config:
    return choose(MANY if sequences >= MANY_SEQUENCES else DECODE, head_dim, dtype)


def prefill_config(head_dim: int, dtype: torch.dtype, queries: int) -> Config:
    """queries: of all heads together."""
    return choose(PREFILL if queries >= ENOUGH_QUERIES else FEW, head_dim, dtype)
