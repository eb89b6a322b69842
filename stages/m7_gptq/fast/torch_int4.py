"""A 4-bit weight on a CPU for which there are no kernels of ours (ARM, or without Numba): PyTorch's packed kernel."""

import math

import torch

from common.models.quantized_weight import QuantizedWeight


class TorchInt4Linear:
    """`x @ weight.T + bias` in bfloat16, for a 4-bit weight whose groups lie in order.

    PyTorch's kernel computes `(code - 8) * scale + middle` with both numbers in bfloat16, and knows groups of 32, 64,
    128 and 256 that divide the inputs: other groups (a shorter last one, one for a whole row) are cut into these.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self._size = group_size(weight)
        self.bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
        group = torch.arange(0, weight.in_features, self._size) // weight.group_size
        scales = weight.scales[group].float()
        middles = (8.0 - weight.zeros[group].float()) * scales
        self._scales_and_zeros = torch.stack((scales, middles), dim=-1).to(torch.bfloat16)
        codes = weight.codes().T.int().contiguous()
        self._packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._multiply(x.contiguous(), self._packed, self._size, self._scales_and_zeros)
        return out if self.bias is None else out.add_(self.bias)

    def weights_bytes(self) -> int:
        tensors = (self._packed, self._scales_and_zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Is the weight, whose groups lie in order, one for this layer?"""
    return weight.bits == 4 and weight.out_features % 64 == 0 and group_size(weight) >= 32 and dtype == torch.bfloat16


def group_size(weight: QuantizedWeight) -> int:
    """The largest of PyTorch's group sizes whose groups lie each within one of the weight's."""
    inputs = weight.in_features
    common = inputs if weight.groups == 1 else math.gcd(weight.group_size, inputs)
    return next((size for size in (256, 128, 64, 32) if common % size == 0), 1)
