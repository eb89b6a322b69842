"""A linear layer over a quantised weight: dequantise, multiply. And what a faster one has to be, behind a Protocol."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from common.models.linear import Projection
from common.models.quantized_weight import QuantizedWeight

ReadQuantized = Callable[[list[str], bool], list[QuantizedWeight | None]]
"""(names, bias): the weights of linear layers, `model.layers.0.self_attn.q_proj` and so on, with their biases if
`bias`; None for a layer that was not quantised."""


class FastLayers(Protocol):
    """The fast twins of one model's layers (`fast/`)."""

    def reader(self, read: ReadQuantized) -> ReadQuantized:
        """The reader, with the weights in an order that saves work at run time; the model computes the same."""
        ...

    def linear(self, weight: QuantizedWeight) -> Projection:
        """The twin of `QuantizedLinear`."""
        ...

    def head(self, weight: torch.Tensor) -> Projection | None:
        """The twin of `QuantizedHead`; weight [vocab, hidden], not yet rounded. None: nothing is faster than that."""


class QuantizedLinear:
    """`x @ weight.T + bias`, the definition: unpack, dequantise, multiply, at every call. x [T, in] to [T, out]."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.weight.bias is None else self.weight.bias.to(x.dtype)
        return F.linear(x, self.weight.dequantize(x.dtype), bias)

    def weights_bytes(self) -> int:
        return self.weight.weights_bytes()


class SideBySide:
    """Layers of the same input whose weights cannot be one matrix: their outputs, one after the other."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = projections

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([projection(x) for projection in self.projections], dim=-1)

    def weights_bytes(self) -> int:
        return sum(projection.weights_bytes() for projection in self.projections)


def quantized_linear(weight: QuantizedWeight, device: torch.device, fast: FastLayers | None = None) -> Projection:
    """The layer of this weight: the definition, or its fast twin."""
    return QuantizedLinear(weight.to(device)) if fast is None else fast.linear(weight)
