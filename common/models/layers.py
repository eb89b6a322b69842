"""The small parts of a decoder layer, in plain PyTorch."""

import torch
import torch.nn.functional as F

from common.errors import require
from common.models.config import ModelConfig

SLICE = 4096  # Positions whose angles are worked out at a time


class RMSNorm:
    """Root mean square layer normalisation over the last dimension, in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # the same in two kernels instead of seven: what eager steps wait for there is their number
            return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return self.definition(x)

    def definition(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self._eps, norm, norm, value=1.0 / x.shape[-1])  # eps included
        return self.weight * (wide * mean_square.rsqrt_()).to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] to [T, I]: silu(first half) * second half (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class RotaryEmbedding:
    """Rotary position embedding (Su et al., 2021), half-split as in Hugging Face checkpoints: dimension i turns
    together with dimension i + D/2.

    `table` [positions, 2, 1, D] is the same for all layers: cosines and sines, computed in float32 and kept in the
    model's dtype. The sine's first half is negated, so that rotating needs no `cat((-second, first))`.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, positions: int | None = None
    ) -> None:
        """positions: rows of the table; None: the model's. Made in slices, as float32 takes more than the result."""
        rows = positions or config.max_position_embeddings
        self.table = torch.empty(rows, 2, 1, config.head_dim, dtype=dtype, device=device)
        for start in range(0, rows, SLICE):
            part = torch.arange(start, min(start + SLICE, rows), device=device)
            self.table[start : start + SLICE] = cosines_and_sines(config, part)
        finite = bool(self.table[-1].isfinite().all())
        require(finite, f"{config.name}: rope_theta or rope_scaling gives position {rows - 1} no finite angle")

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, 1, D] for the tokens of one step."""
        cos, sin = self.table[positions].unbind(1)
        return cos, sin


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads [T, H, D], queries and keys in one go, by cos and signed sin [T, 1, D]."""
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def cosines_and_sines(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    """Rows of the table for positions [P]: float32 [P, 2, 1, D]."""
    angles = torch.outer(positions.float(), inverse_frequencies(config).to(positions.device))
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    cos, sin = angles.cos() * factor, angles.sin() * factor
    halves = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return torch.stack(halves, dim=1)[:, :, None]


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 [D / 2], on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    return scaling.stretch(frequencies, config.rope_theta) if scaling else frequencies
