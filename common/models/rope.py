"""Rotary frequencies, stretched to reach further than a model was trained.
`stretch` takes and returns radians per position of each pair of dimensions, float32 [D / 2]; cosines and sines are
multiplied by `attention_factor`."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from common.errors import require, require_real


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Position Interpolation; Chen et al., 2023)."""

    factor: float
    kind: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's (The Llama 3 Herd of Models, section 3.4.3): waves that fit often into the original context stay,
    those longer than it are stretched by `factor`, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    kind: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        waves_in_context = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): as Llama 3's, but blended by a pair's number, and attention gets sharper."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    kind: ClassVar[str] = "yarn"

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        pairs, context = len(frequencies), self.original_max_position_embeddings / (2 * math.pi)
        # The pairs of dimensions that turn beta_fast and beta_slow times within the original context.
        fast, slow = (pairs * math.log(context / beta, theta) for beta in (self.beta_fast, self.beta_slow))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * pairs - 1)
        ramp = ((torch.arange(pairs) - low) / (high - low or 0.001)).clamp(0.0, 1.0)
        return frequencies * (1.0 - ramp) + frequencies / self.factor * ramp


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling

SCALINGS: dict[str, type[RopeScaling]] = {cls.kind: cls for cls in (LinearScaling, Llama3Scaling, YarnScaling)}
"""By config.json's `rope_type`; what they hold has the same names there."""


def checked(where: str, scaling: RopeScaling, theta: float) -> RopeScaling:
    """The scaling of frequencies with that base; `UserError` unless its numbers can be right."""
    for key, value in vars(scaling).items():
        require_real(f"{where}: {key} of type {scaling.kind!r}", value)
    require(scaling.kind != "yarn" or theta > 1, f"{where}: rope_theta, the base, must be above 1 with yarn")
    steps = not isinstance(scaling, Llama3Scaling) or scaling.high_freq_factor > scaling.low_freq_factor
    require(steps, f"{where}: high_freq_factor must be above low_freq_factor")
    return scaling


def yarn_attention_factor(factor: float, mscale: float = 0, mscale_all_dim: float = 0) -> float:
    """YaRN's where none is given. DeepSeek's two scales count together only."""
    growth = 0.1 * math.log(max(factor, 1.0))
    both = mscale and mscale_all_dim
    return (growth * mscale + 1.0) / (growth * mscale_all_dim + 1.0) if both else growth + 1.0
