"""Which fast layer takes which weight."""

import torch

from common.config import EngineConfig
from common.execution.choose import choose_linear
from common.models.linear import Linear, Projection
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.fast import cpu_int4, int8_head, triton_int4
from stages.m7_gptq.fast.cpu_int4 import CpuInt4Linear, Scratch
from stages.m7_gptq.fast.group_order import Folded, Permuted, in_group_order
from stages.m7_gptq.fast.int8_head import Int8Head
from stages.m7_gptq.fast.triton_int4 import TritonInt4Linear
from stages.m7_gptq.head import round_rows
from stages.m7_gptq.linear import FastLayers, ReadQuantized


def choose_fast(config: EngineConfig) -> FastLayers | None:
    """The fast layers of one model; None where `linear_backend` asks for the definition."""
    return None if config.linear_backend == "naive" else Int4Layers(config.torch_dtype, config.torch_device)


class Int4Layers:
    """`FastLayers`: 4 bits in a kernel where one takes the weight; else (float32, 8 bits, odd shapes) the weight is
    dequantised once. scratch: shared by the layers of a model on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.scratch = Scratch()

    def reader(self, read: ReadQuantized) -> ReadQuantized:
        return read if self._dtype == torch.float32 else Folded(read)

    def linear(self, weight: QuantizedWeight) -> Projection:
        ordered, order = in_group_order(weight)
        if not takes(ordered, self._dtype, self._device):
            full = weight.dequantize(self._dtype).to(self._device)
            return choose_linear(full, None if weight.bias is None else weight.bias.to(self._device, self._dtype))
        if self._device.type == "cpu":
            projection: Projection = CpuInt4Linear(ordered, self.scratch)
        else:
            projection = TritonInt4Linear(ordered, self._dtype, self._device)
        return projection if order is None else Permuted(projection, order.to(self._device))

    def head(self, weight: torch.Tensor) -> Projection | None:
        if self._dtype == torch.float32:
            return Linear(round_rows(weight).dequantize(self._dtype))
        return Int8Head(round_rows(weight)) if int8_head.takes(weight) else None


def takes(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Can the weight be multiplied in 4 bits on that device? Its groups must be of one size, in order."""
    return weight.g_idx is None and (cpu_int4 if device.type == "cpu" else triton_int4).takes(weight, dtype)
