"""Linear layers over 4-bit weights: the one to read, the choice between the fast ones, and how layers are joined.

Whatever the checkpoint, a fast layer sees a weight whose groups lie in order: group g is inputs g * size and on. With
act-order GPTQ deals the inputs to groups as it likes; `in_group_order` sorts a weight's inputs by group once, at load,
and `Permuted` does the same to x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from common.models.linear import Projection, make_linear
from common.models.quantized_weight import QuantizedWeight, pack
from stages.m7_gptq import cpu_linear, triton_linear
from stages.m7_gptq.cpu_linear import CpuInt4Linear, Scratch
from stages.m7_gptq.triton_linear import TritonInt4Linear


class TwinLinear:
    """The readable twin of the fast layers: unpack, dequantise, multiply, at every call."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.weight.bias is None else self.weight.bias.to(x.dtype)
        return F.linear(x, self.weight.dequantize(x.dtype), bias)

    def weights_bytes(self) -> int:
        return self.weight.weights_bytes()


class Permuted:
    """A layer whose inputs were sorted: gives it x sorted likewise."""

    def __init__(self, projection: Projection, order: torch.Tensor) -> None:
        self.projection = projection
        self.order = order

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x.index_select(1, self.order))

    def weights_bytes(self) -> int:
        return self.projection.weights_bytes() + self.order.nbytes


class SideBySide:
    """Layers of the same input whose weights cannot be one matrix: their outputs, one after the other."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = projections

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([projection(x) for projection in self.projections], dim=-1)

    def weights_bytes(self) -> int:
        return sum(projection.weights_bytes() for projection in self.projections)


def quantized_linear(
    weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, scratch: Scratch | None = None
) -> Projection:
    """The fastest layer for this weight; where none fits (float32, 8 bits, odd shapes), its dequantised copy.

    scratch: shared by the layers of a model on the CPU.
    """
    ordered, order = in_group_order(weight)
    if why_not(ordered, dtype, device) is not None:
        full = weight.dequantize(dtype).to(device)
        return make_linear(full, None if weight.bias is None else weight.bias.to(device, dtype))
    if device.type == "cpu":
        projection: Projection = CpuInt4Linear(ordered, scratch)
    else:
        projection = TritonInt4Linear(ordered, dtype, device)
    return projection if order is None else Permuted(projection, order.to(device))


def why_not(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps a weight from being multiplied in 4 bits on that device; None: nothing."""
    if weight.g_idx is not None:
        return "its groups are of different sizes"
    return (cpu_linear if device.type == "cpu" else triton_linear).why_not(weight, dtype)


def in_group_order(weight: QuantizedWeight) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """The weight with its inputs sorted by group and without g_idx, and the order [in] to sort x by; None: as it is.

    A weight whose groups, once sorted, are not all of `group_size` inputs is left alone, and keeps its g_idx.
    """
    if weight.g_idx is None:
        return weight, None
    group = weight.group_index()
    order = group.argsort(stable=True)
    plain = torch.arange(weight.in_features, device=group.device) // weight.group_size
    if not torch.equal(group[order], plain):
        return weight, None
    if torch.equal(group, plain):
        return replace(weight, g_idx=None), None
    return replace(weight, qweight=pack(weight.codes()[order], weight.bits), g_idx=None), order


def select_outputs(weight: QuantizedWeight, order: torch.Tensor) -> QuantizedWeight:
    """The weight with its outputs in another order."""
    bias = None if weight.bias is None else weight.bias[order]
    return replace(
        weight,
        qweight=weight.qweight[:, order],
        scales=weight.scales[:, order],
        zeros=weight.zeros[:, order],
        bias=bias,
    )
