"""Tile sizes, warps and pipeline stages, by head dimension and format: a table, set from measurements on Hopper GPUs.

TILE: tokens of K and V at a time; ROWS: queries at a time. A float32 tile is twice as large and leaves room for fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

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
PREFILL: dict[tuple[int, int], Config] = {
    (64, 2): {"ROWS": 64, "TILE": 128, "num_warps": 4, "num_stages": 3},
    (128, 2): {"ROWS": 128, "TILE": 64, "num_warps": 4, "num_stages": 3},
    (256, 2): {"ROWS": 64, "TILE": 64, "num_warps": 8, "num_stages": 2},
    (64, 4): {"ROWS": 64, "TILE": 32, "num_warps": 4, "num_stages": 2},
    (128, 4): {"ROWS": 32, "TILE": 32, "num_warps": 4, "num_stages": 2},
    (256, 4): {"ROWS": 16, "TILE": 32, "num_warps": 4, "num_stages": 2},
}
MIN_ROWS = 32
ENOUGH_PROGRAMS = 128
"""About as many as a large GPU has processors."""


@dataclass(frozen=True)
class Splitting:
    """How contexts are cut into parts that different programs read.

    decode_grid: a batch of decodes gets up to so many times the programs that fill the GPU, and uses those that are too
    many where one context is far longer than the others: parts of more than `long_part` tokens are cut further.
    prefill_programs: chunks of few tokens get up to so many programs for each processor, by cutting their context into
    parts of at least `prefill_part` tokens; 0: a context is never cut, and narrower tiles have to do.
    """

    decode_grid: int = 1
    long_part: int = 512
    prefill_programs: int = 0
    prefill_part: int = 256


DEFAULT_SPLITTING = Splitting()
MAX_PREFILL_SPLITS = 16
SPLIT_ROWS = 64
"""Queries at a time where contexts are cut: wide tiles, as there are programs enough."""


def _choose(table: dict[tuple[int, int], Config], head_dim: int, dtype: torch.dtype) -> Config:
    return next(config for (limit, size), config in table.items() if head_dim <= limit and size == dtype.itemsize)


def decode_config(head_dim: int, dtype: torch.dtype) -> Config:
    return _choose(DECODE, head_dim, dtype)


def prefill_config(head_dim: int, dtype: torch.dtype, num_tokens: int, heads: int) -> Config:
    """With few queries, narrower tiles: each program goes through the whole context, so what counts then is that every
    processor has one."""
    config = _choose(PREFILL, head_dim, dtype)
    rows = config["ROWS"]
    while rows > MIN_ROWS and num_tokens * heads < ENOUGH_PROGRAMS * rows:
        rows //= 2
    return {**config, "ROWS": rows}


def prefill_splits(
    head_dim: int, dtype: torch.dtype, num_tokens: int, heads: int, max_seq_len: int, programs: int,
    least: int,
) -> tuple[Config, int]:  # fmt: skip
    """The tiles of `num_tokens` queries, and into how many parts their contexts are cut. All of this follows from
    shapes, so that a CUDA graph may keep it. programs: so many are wanted; least: tokens of a part."""
    config = _choose(PREFILL, head_dim, dtype)
    rows = min(config["ROWS"], SPLIT_ROWS)
    while rows > MIN_ROWS and 2 * num_tokens <= rows:
        rows //= 2
    tiles = -(-num_tokens // rows)
    splits = min(programs // (heads * tiles), MAX_PREFILL_SPLITS, -(-max_seq_len // least))
    if splits > 1:
        return {**config, "ROWS": rows}, splits
    return prefill_config(head_dim, dtype, num_tokens, heads), 1
