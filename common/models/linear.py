"""A linear layer, and three of the same for bfloat16 on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from common.execution.cpu.arrays import NUMBA_POOL_LOCK, bits


class Projection(Protocol):
    """What a decoder layer asks of `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        ...

    def weights_bytes(self) -> int: ...


@runtime_checkable
class Adds(Protocol):
    """A projection that also adds to the residual, in the same pass. No projection has to: fused kernels ask."""

    def add_to(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [T, out] + self(y), y [T, in]; may be written over x."""
        ...


@runtime_checkable
class Fuses(Protocol):
    """A projection with a kernel of its own for few tokens, which also computes what stands before and behind the
    product. No projection has to: fused kernels ask."""

    def small_batch_kernel(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        """That kernel, called as `common.execution.gpu.triton_gemv.gemv` is but for weight and bias; None: for so many
        tokens, or with a gate, there is none."""
        ...


class Linear:
    """`x @ weight.T + bias`: weight [out, in], bias [out] or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x if self.bias is None else x.add_(self.bias)
        return x.addmm_(y, self.weight.t())  # a matrix product adds to what is there already: no second pass

    def weights_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class OneDnnLinear:
    """A `Linear` in bfloat16 on the CPU whose weight oneDNN has reordered once, into the tiles that it multiplies.

    `F.linear` reorders at every call: for few tokens that costs as much as the product, so that decoding one token
    takes half the time with a packed weight. The results are the same, bit for bit. The packed copy has the weight's
    size, and the weight itself is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._bytes = weight.nbytes
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight [out, in], unpacked anew at every call."""
        return self._packed.to_dense()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self._packed, self.bias, "none", [], "")

    def weights_bytes(self) -> int:
        return self._bytes + (0 if self.bias is None else self.bias.nbytes)


class UpcastLinear(Linear):
    """A `Linear` in bfloat16 on a CPU that has no instructions for it, where PyTorch takes about as long for each of
    many rows as for one alone. From `many` rows on it multiplies in float32; converting the weight at every call is
    worth it.
    """

    many = 16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) < self.many:
            return self.few(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)

    def few(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)


class NumbaLinear(UpcastLinear):
    """The same with a kernel of our own (Numba) for 2 to `many` - 1 rows, which reads the weight once for all."""

    many = 128

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        from common.execution.cpu import cpu_linear, simd

        super().__init__(weight, bias)
        self._multiply, (self._outputs, self._size) = cpu_linear.linear, weight.shape
        self._lanes = simd.width(simd.LANES)
        self._flat, self._bias = bits(weight.flatten()), bits(weight[:0, 0] if bias is None else bias)

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Are its sides made of whole vectors?"""
        return importlib.util.find_spec("numba") is not None and all(side % 16 == 0 for side in weight.shape)

    def few(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 or x.dtype != self.weight.dtype or x.shape[1:] != (self._size,):
            return super().few(x)  # which also says what is wrong with x
        x, rows = x.contiguous(), len(x)
        out = x.new_empty(rows, self._outputs)
        sizes = rows, self._outputs, self._size
        with NUMBA_POOL_LOCK:
            self._multiply(
                x.data_ptr(), self._flat, self._bias, *sizes, self._lanes, torch.get_num_threads(), out.data_ptr()
            )
        return out


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear | OneDnnLinear:
    """The fastest of the four for this weight's device and dtype."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return Linear(weight, bias)
    if _can_pack():
        return OneDnnLinear(weight, bias)
    return NumbaLinear(weight, bias) if NumbaLinear.takes(weight) else UpcastLinear(weight, bias)


def _can_pack() -> bool:
    """Was PyTorch built with oneDNN, and does this processor take bfloat16?"""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
