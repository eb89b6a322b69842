"""The numbers that a quantised weight can take: scale and zero point of a group, and rounding to them."""

from collections.abc import Callable

import torch

from common.models.quantized_weight import QuantizedWeight, pack
from stages.m7_gptq.settings import Settings

SHARES = [1.05 - 0.5 * step / 32 for step in range(33)]
"""What the search makes of the range from the smallest to the largest weight: some more of it, or as little as half.
A little more lets a range end where the zero point is a whole number."""

SMALLEST_SCALE = 2.0**-24  # the smallest positive number of float16


class Grid:
    """One group's grid for each output: `value = (code - zero) * scale`, code in 0 ... max_code.

    scale, zero: float32 [out]. The scale is one that float16 can hold, because that is what a checkpoint stores: the
    error of rounding it is then part of what GPTQ sees and makes good.
    """

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor, max_code: int) -> None:
        self.scale = scale
        self.zero = zero
        self.max_code = max_code

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes of weights [..., out], as float32."""
        return weight.div(self.scale).round_().add_(self.zero).clamp_(0, self.max_code)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self.zero) * self.scale


def fit_grid(weight: torch.Tensor, settings: Settings, importance: torch.Tensor | None = None) -> Grid:
    """The grid of one group: weight float32 [inputs of the group, out], importance [inputs of the group] or None.

    Without the search it spans the smallest to the largest weight (and 0). The search tries narrower ranges, which clip
    the outermost weights and are finer for all others, and both whole numbers next to the ideal zero point. It keeps,
    for each output, what has the least squared error, each input's weighted by its importance (the mean square of the
    activation).
    """
    low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
    if settings.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _span(low, high, settings)
    if not settings.search:
        return best
    best_error = _error(weight, best, importance)
    for share in SHARES:
        for rounding in (torch.round,) if settings.symmetric else (torch.floor, torch.ceil):
            grid = _span(low * share, high * share, settings, rounding)
            error = _error(weight, grid, importance)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best.scale = torch.where(better, grid.scale, best.scale)
            best.zero = torch.where(better, grid.zero, best.zero)
    return best


def assemble(
    codes: torch.Tensor,
    grids: list[Grid],
    g_idx: torch.Tensor | None,
    settings: Settings,
    bias: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Codes [in, out] and the grids of their groups, packed."""
    return QuantizedWeight(
        qweight=pack(codes, settings.bits),
        scales=torch.stack([grid.scale for grid in grids]).to(torch.float16),
        zeros=torch.stack([grid.zero for grid in grids]).to(torch.uint8),
        g_idx=g_idx,
        bits=settings.bits,
        group_size=settings.group_of(codes.shape[0]),
        bias=bias,
    )


def _span(
    low: torch.Tensor,
    high: torch.Tensor,
    settings: Settings,
    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round,
) -> Grid:
    """The grid whose codes reach from low to high; a group of zeros gets a scale of 1."""
    scale = (high - low) / settings.max_code
    scale = torch.where(scale == 0, 1.0, scale).clamp_(min=SMALLEST_SCALE).to(torch.float16).float()
    if settings.symmetric:
        zero = torch.full_like(scale, (settings.max_code + 1) // 2)
    else:
        zero = rounding(-low / scale).clamp_(0, settings.max_code)
    return Grid(scale, zero, settings.max_code)


def _error(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    error = (grid.values(grid.codes(weight)) - weight).square_()
    return error.sum(0) if importance is None else importance @ error
