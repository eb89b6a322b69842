"""A 4-bit weight on the CPU: PyTorch's packed kernel for few tokens, bfloat16 written out for many."""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.execution.cpu.arrays import NUMBA_POOL_LOCK
from common.models.quantized_weight import QuantizedWeight

DEQUANTIZE_TOKENS = 56  # PyTorch's kernel takes time in proportion to them; writing the weight out is faster from here
OUTPUTS = 64  # our kernel writes this many outputs at a time; it takes only weights with a multiple of it


class Scratch:
    """Memory that the layers of one model write their weights out to, one after the other: a fresh piece for each
    would cost more time in page faults than the writing does."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], holding anything; the next caller gets the same memory."""
        if self._memory.numel() < rows * columns:
            self._memory = torch.empty(rows * columns, dtype=torch.bfloat16)
        return self._memory[: rows * columns].view(rows, columns)


class CpuInt4Linear:
    """`x @ weight.T + bias` in bfloat16, for a 4-bit weight whose groups lie in order.

    PyTorch's kernel computes `(code - 8) * scale + middle` with both numbers in bfloat16, and knows groups of 32, 64,
    128 and 256 that divide the inputs: other groups (a shorter last one, one for a whole row) are cut into these.
    """

    def __init__(self, weight: QuantizedWeight, scratch: Scratch | None = None) -> None:
        self._size = group_size(weight)
        self._scratch = scratch or Scratch()
        self.bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
        group = torch.arange(0, weight.in_features, self._size) // weight.group_size
        scales = weight.scales[group].float()
        middles = (8.0 - weight.zeros[group].float()) * scales
        self._scales_and_zeros = torch.stack((scales, middles), dim=-1).to(torch.bfloat16)
        codes = weight.codes().T.int().contiguous()
        self._packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self._dequantize = _dequantizer()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < DEQUANTIZE_TOKENS or self._dequantize is None:
            out = self._multiply(x.contiguous(), self._packed, self._size, self._scales_and_zeros)
            return out if self.bias is None else out.add_(self.bias)
        weight = self._scratch.take(x.shape[1], self._packed.shape[0])
        with NUMBA_POOL_LOCK:
            self._dequantize(self._packed, self._scales_and_zeros, weight)
        return F.linear(x, weight.T, self.bias)

    def weights_bytes(self) -> int:
        tensors = (self._packed, self._scales_and_zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Is the weight, whose groups lie in order, one for this layer?"""
    fits = weight.bits == 4 and weight.out_features % OUTPUTS == 0 and group_size(weight) >= 32
    return fits and dtype == torch.bfloat16


def group_size(weight: QuantizedWeight) -> int:
    """The largest of PyTorch's group sizes whose groups lie each within one of the weight's."""
    inputs = weight.in_features
    common = inputs if weight.groups == 1 else math.gcd(weight.group_size, inputs)
    return next((size for size in (256, 128, 64, 32) if common % size == 0), 1)


@functools.cache
def _dequantizer() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None:
    """The compiled function; None where Numba is missing or PyTorch lays weights out otherwise on this processor."""
    if importlib.util.find_spec("numba") is None:
        return None
    from stages.m7_gptq.fast.kernels import cpu_dequantize

    return cpu_dequantize.dequantize if cpu_dequantize.knows_layout() else None
