"""Rotary frequencies, and how models stretch them to reach further than they were trained.

Each class holds the parameters that `config.json` has under the same names. Its `stretch` takes and returns radians per
position of each pair of dimensions, float32 [D / 2]; cosines and sines are multiplied by its `attention_factor`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Extending Context Window via Positional Interpolation; Chen et al., 2023)."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class DynamicScaling:
    """Grows with lengths over `max_position_embeddings`, which no request here reaches: up to there nothing changes."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        return frequencies


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary frequencies (The Llama 3 Herd of Models, section 3.4.3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """Waves that fit often into the original context stay, those longer than it are stretched by `factor`, those
        between are blended."""
        waves_in_context = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): as Llama 3's, but blended by a dimension's number, and attention gets sharper."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        pairs, context = len(frequencies), self.original_max_position_embeddings
        # The pairs of dimensions that turn beta_fast and beta_slow times within the original context.
        low, high = (
            pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = ((torch.arange(pairs) - low) / (high - low or 0.001)).clamp(0.0, 1.0)
        return frequencies * (1.0 - ramp) + frequencies / self.factor * ramp


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling

SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
"""By `rope_type`, beside 'default'."""


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What YaRN multiplies cosines and sines by where no factor is named; DeepSeek's mscales count in pairs only."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1.0)
