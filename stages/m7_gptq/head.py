"""The output head in 8 bits: what 4-bit layers leave to be read.

vocabulary x hidden numbers are most of a small model's bytes once its layers are in 4 bits. Rounded to nearest at load,
with one scale for each row, they lose next to nothing, so nothing is calibrated or stored in a checkpoint. The
embedding stays as it is, also where it is the same matrix: a lookup reads one row a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.models.linear import Linear, PackedLinear, Projection
from stages.m7_gptq.linear import FastLayers

LARGEST = 127  # the codes are -127 ... 127: symmetric, as the scale's absolute maximum is
PART = 8192  # rows that are rounded at once: in float32 the whole head would take twice its memory


@dataclass
class HeadWeight:
    """codes: int8 [vocab, hidden]; scales: float32 [vocab]. weight = code * scale."""

    codes: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        parts = zip(self.codes.split(PART), self.scales.split(PART), strict=True)
        return torch.cat([(codes * scales[:, None]).to(dtype) for codes, scales in parts])

    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def round_rows(weight: torch.Tensor) -> HeadWeight:
    """Each row [hidden] to the nearest of 255 numbers, the largest of which is the row's largest."""
    codes, scales = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    for part, code, scale in zip(weight.split(PART), codes.split(PART), scales.split(PART), strict=True):
        full = part.float()
        scale.copy_(full.abs().amax(1) / LARGEST)
        step = torch.where(scale > 0, scale, 1.0)  # a row of zeros: 0 / 0 would be no number
        code.copy_((full / step[:, None]).round_())
    return HeadWeight(codes, scales)


class QuantizedHead:
    """`x @ weight.T`, the definition: dequantise, multiply, at every call. x [T, hidden] to [T, vocab]."""

    def __init__(self, weight: HeadWeight) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize(x.dtype))

    def weights_bytes(self) -> int:
        return self.weight.nbytes()


def eight_bit_head(head: Projection, fast: FastLayers | None = None) -> Projection:
    """The head in 8 bits: the definition, or its fast twin. A head that has none is left alone."""
    if fast is None:
        return QuantizedHead(round_rows(head.weight)) if isinstance(head, Linear | PackedLinear) else head
    return (fast.head(head.weight) if isinstance(head, Linear | PackedLinear) else None) or head
