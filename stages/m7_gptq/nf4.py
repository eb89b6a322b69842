"""NF4, for comparison: 16 values at quantiles of the normal distribution (Dettmers et al., "QLoRA", NeurIPS 2023,
appendix E). Only its effect on a weight, no storage: the engine does not run it."""

from __future__ import annotations

import torch

BLOCK = 64
"""Weights that share a scale, as in QLoRA."""

BITS = 4 + 16 / BLOCK
"""Bits of a weight with its share of a float16 scale (QLoRA quantises the scales once more, to 4.127)."""

_OFFSET = 0.9677083
"""The outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, one for each of the halves."""


def nf4_values() -> torch.Tensor:
    """The 16 values, float32, in -1 ... 1: 8 for positive numbers, 7 for negative ones, and 0."""
    positive = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()


def to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] after rounding to NF4; a last block of an output may have fewer weights."""
    values = nf4_values().to(weight.device)
    middles = (values[1:] + values[:-1]) / 2
    parts = weight.float().split(BLOCK, dim=1)
    rounded: list[torch.Tensor] = []
    for part in parts:
        scale = part.abs().amax(1, keepdim=True).to(torch.float16).float()
        scale = torch.where(scale == 0, 1.0, scale)
        rounded.append(values[torch.bucketize(part / scale, middles)] * scale)
    return torch.cat(rounded, dim=1)
