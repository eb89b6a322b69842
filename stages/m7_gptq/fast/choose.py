"""Which fast layer takes which weight."""

import torch

from common.config import EngineConfig
from common.execution.choose import choose_linear
from common.models.linear import Linear, Projection
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.fast import cpu_codes, int8_head, torch_int4, triton_int4
from stages.m7_gptq.fast.cpu_codes import CpuInt4Linear, CpuInt8Head
from stages.m7_gptq.fast.group_order import Folded, Permuted, in_group_order
from stages.m7_gptq.fast.int8_head import Int8Head
from stages.m7_gptq.fast.torch_int4 import TorchInt4Linear
from stages.m7_gptq.fast.triton_int4 import TritonInt4Linear
from stages.m7_gptq.head import round_rows
from stages.m7_gptq.linear import FastLayers, ReadQuantized


def choose_fast(config: EngineConfig) -> FastLayers | None:
    """The fast layers of one model; None where `linear_backend` asks for the definition."""
    return None if config.linear_backend == "naive" else Int4Layers(config.torch_dtype, config.torch_device)


class Int4Layers:
    """`FastLayers`: 4 bits in a kernel where one takes the weight; else (float32, 8 bits, odd shapes) the weight is
    dequantised once."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def reader(self, read: ReadQuantized) -> ReadQuantized:
        return read if self._dtype == torch.float32 else Folded(read)

    def linear(self, weight: QuantizedWeight) -> Projection:
        ordered, order = in_group_order(weight)
        projection = self._in_order(ordered) if ordered.g_idx is None else None
        if projection is None:
            full = weight.dequantize(self._dtype).to(self._device)
            return choose_linear(full, None if weight.bias is None else weight.bias.to(self._device, self._dtype))
        return projection if order is None else Permuted(projection, order.to(self._device))

    def _in_order(self, weight: QuantizedWeight) -> Projection | None:
        """The kernel that multiplies a weight whose groups lie in order; None: there is none."""
        if self._device.type != "cpu":
            takes = triton_int4.takes(weight, self._dtype)
            return TritonInt4Linear(weight, self._dtype, self._device) if takes else None
        if cpu_codes.takes(weight, self._dtype):
            return CpuInt4Linear(weight)
        return TorchInt4Linear(weight) if torch_int4.takes(weight, self._dtype) else None

    def head(self, weight: torch.Tensor) -> Projection | None:
        if self._dtype == torch.float32:
            return Linear(round_rows(weight).dequantize(self._dtype))
        if cpu_codes.takes_head(weight):
            return CpuInt8Head(round_rows(weight))
        return Int8Head(round_rows(weight)) if int8_head.takes(weight) else None
