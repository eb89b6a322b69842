"""NF4, the third method to quantise with: 16 values at quantiles of the normal distribution, and the largest weight of
each block as its scale (Dettmers et al., "QLoRA", NeurIPS 2023, appendix E)."""

from __future__ import annotations

import torch

from common.models.sources.nf4 import BLOCK, NF4Weight, table

SMALLEST = 1e-38
"""Blocks whose largest weight is below it become zeros, as in bitsandbytes: its inverse would not be finite."""

_OFFSET = 0.9677083
"""The outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, one for each of the halves."""


def nf4_values() -> torch.Tensor:
    """Where `VALUES` come from, float32 [16] in -1 ... 1: 8 for positive numbers, 7 for negative ones, and 0. Equal to
    them but for the last bit."""
    positive = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()


def to_nf4(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NF4Weight:
    """Round a weight [out, in] to the nearest values of its blocks; 64 must divide `in`. The codes are those that
    bitsandbytes finds."""
    values = table(weight.device)
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    shares = blocks * (1 / scales.clamp(min=SMALLEST))[..., None]
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8).flatten(1)
    return NF4Weight(codes[:, ::2] << 4 | codes[:, 1::2], scales, bias)
