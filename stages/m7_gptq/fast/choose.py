"""Which fast layer takes which weight."""

from __future__ import annotations

import torch

from common.models.linear import Projection
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.fast import cpu_int4, int8_head, triton_int4
from stages.m7_gptq.fast.cpu_int4 import CpuInt4Linear, Scratch
from stages.m7_gptq.fast.group_order import Folded, Permuted, in_group_order
from stages.m7_gptq.fast.int8_head import Int8Head
from stages.m7_gptq.fast.triton_int4 import TritonInt4Linear
from stages.m7_gptq.head import round_rows
from stages.m7_gptq.linear import FastLayers, ReadQuantized


def choose_fast(dtype: torch.dtype, device: torch.device) -> FastLayers | None:
    """The fast layers of one model; None in float32, where all are multiplied by their dequantised weights."""
    return None if dtype == torch.float32 else Int4Layers(dtype, device)


class Int4Layers:
    """`FastLayers` in 16 bits. scratch: shared by the layers of a model on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.scratch = Scratch()

    def reader(self, read: ReadQuantized) -> ReadQuantized:
        return Folded(read)

    def linear(self, weight: QuantizedWeight) -> Projection | None:
        ordered, order = in_group_order(weight)
        if not takes(ordered, self._dtype, self._device):
            return None
        if self._device.type == "cpu":
            projection: Projection = CpuInt4Linear(ordered, self.scratch)
        else:
            projection = TritonInt4Linear(ordered, self._dtype, self._device)
        return projection if order is None else Permuted(projection, order.to(self._device))

    def head(self, weight: torch.Tensor) -> Projection | None:
        return Int8Head(round_rows(weight)) if int8_head.takes(weight) else None


def takes(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Can the weight be multiplied in 4 bits on that device? Its groups must be of one size, in order."""
    return weight.g_idx is None and (cpu_int4 if device.type == "cpu" else triton_int4).takes(weight, dtype)
