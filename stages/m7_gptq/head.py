"""The output head in 8 bits: what 4-bit layers leave to be read.

vocabulary x hidden numbers are most of a small model's bytes once its layers are in 4 bits. Rounded to nearest, with
one scale for each row, they lose next to nothing, so nothing has to be calibrated: it is done at load, and no
checkpoint knows of it. The embedding stays as it is, also where it is the same matrix: a lookup reads one row a token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.execution.gpu.launch import launch_options
from common.models.linear import Linear, Projection

LARGEST = 127
"""The codes are -127 ... 127: symmetric, as the scale's absolute maximum is."""
PART = 8192
"""Rows that are rounded at once: in float32 the whole head would take twice its memory."""


@dataclass
class HeadWeight:
    """codes: int8 [vocab, hidden]; scales: float32 [vocab]. weight = code * scale."""

    codes: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([(c * s[:, None]).to(dtype) for c, s in zip(*self._parts(), strict=True)])

    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def _parts(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        return self.codes.split(PART), self.scales.split(PART)


def round_rows(weight: torch.Tensor) -> HeadWeight:
    """Each row [hidden] to the nearest of 255 numbers, the largest of which is the row's largest."""
    codes, scales = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    for part, code, scale in zip(weight.split(PART), codes.split(PART), scales.split(PART), strict=True):
        full = part.float()
        scale.copy_(full.abs().amax(1) / LARGEST)
        step = torch.where(scale > 0, scale, 1.0)  # a row of zeros: 0 / 0 would be no number
        code.copy_((full / step[:, None]).round_())
    return HeadWeight(codes, scales)


class TwinHead:
    """The readable twin of `Int8Head`: dequantise, multiply, at every call."""

    def __init__(self, weight: HeadWeight) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize(x.dtype))

    def weights_bytes(self) -> int:
        return self.weight.nbytes()


class Int8Head:
    """`x @ weight.T` on a GPU, by one kernel for few tokens and another for more: both multiply by the same 8-bit
    weight, so that a token does not depend on how many share its step."""

    def __init__(self, weight: HeadWeight, overlap: bool = True) -> None:
        from stages.m7_gptq.kernels import triton_int8

        self._gemv, self._tiles, self._few = triton_int8.gemv, triton_int8.tiles, triton_int8.GEMV_TOKENS
        self._launch = launch_options(weight.codes.device, overlap)
        self.words, self.scales = triton_int8.lay_out(weight.codes), weight.scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self._few:
            return self._gemv(x, self.words, self.scales, self._launch)
        return self._tiles(x, self.words, self.scales)

    def kernel_for_few(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        if tokens > self._few or gated:
            return None
        return partial(self._gemv, words=self.words, scales=self.scales)

    def weights_bytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


def eight_bit_head(head: Projection) -> Projection:
    """The head in 8 bits: on a GPU as it is, in float32 dequantised, as all of m7's weights are there. On a CPU in 16
    bits it is left alone: no kernel would make it faster."""
    if not isinstance(head, Linear):
        return head
    if head.weight.dtype == torch.float32:
        return Linear(round_rows(head.weight).dequantize(torch.float32))
    return Int8Head(round_rows(head.weight)) if why_not(head.weight) is None else head


def why_not(weight: torch.Tensor) -> str | None:
    """What keeps the kernels from a weight [vocab, hidden] in 16 bits; None: nothing."""
    if weight.device.type != "cuda":
        return "they are for a GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return f"they know multiples of 4 inputs, not {weight.shape[1]}" if weight.shape[1] % 4 else None
