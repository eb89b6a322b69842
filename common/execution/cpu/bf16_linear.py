"""Faster variants of `Linear` for bfloat16 on a CPU, besides `PanelLinear`; `common.execution.choose` chooses."""

import importlib.util

import torch
import torch.nn.functional as F

from common.execution.cpu.arrays import NUMBA_POOL_LOCK, bits
from common.models.linear import Linear, PackedLinear


class OneDnnLinear(PackedLinear):
    """The weight is reordered once, into the tiles that oneDNN multiplies. `F.linear` reorders at every call, which for
    few tokens costs as much as the product. The results are the same, bit for bit; only the packed copy is kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._bytes = weight.nbytes
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        return self._packed.to_dense()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self._packed, self.bias, "none", [], "")

    def weights_bytes(self) -> int:
        return self._bytes + (0 if self.bias is None else self.bias.nbytes)


class UpcastLinear(Linear):
    """For a CPU without bfloat16 instructions, where PyTorch takes about as long for each of many rows as for one.
    From `many` rows on it multiplies in float32: that is worth converting the weight at every call."""

    many = 16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) < self.many:
            return self.small_batch(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)

    def small_batch(self, x: torch.Tensor) -> torch.Tensor:
        """Fewer rows than `many`."""
        return super().__call__(x)


class NumbaLinear(UpcastLinear):
    """The same with a kernel of our own (Numba) for 2 to `many` - 1 rows, which reads the weight once for all."""

    many = 128

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        from common.execution.cpu import cpu_linear, simd  # they import Numba

        super().__init__(weight, bias)
        self._multiply, (self._outputs, self._size) = cpu_linear.linear, weight.shape
        self._lanes = simd.width(simd.LANES)
        self._flat, self._bias = bits(weight.flatten()), bits(weight[:0, 0] if bias is None else bias)

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Are its sides made of whole vectors?"""
        return importlib.util.find_spec("numba") is not None and all(side % 16 == 0 for side in weight.shape)

    def small_batch(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 or x.dtype != self.weight.dtype or x.shape[1:] != (self._size,):
            return super().small_batch(x)  # which also says what is wrong with x
        x, rows = x.contiguous(), len(x)
        out = x.new_empty(rows, self._outputs)
        sizes = rows, self._outputs, self._size
        with NUMBA_POOL_LOCK:
            self._multiply(
                x.data_ptr(), self._flat, self._bias, *sizes, self._lanes, torch.get_num_threads(), out.data_ptr()
            )
        return out
