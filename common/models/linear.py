"""A linear layer, and what may replace it. `common.execution.choose` has faster ones for bfloat16 on a CPU."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F


class Projection(Protocol):
    """What a decoder layer asks of `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        ...

    def weights_bytes(self) -> int: ...


class Fuses(Protocol):
    """A projection with a kernel of its own for few tokens, which also computes what comes before and after the
    product. Optional: fused kernels ask for it."""

    def small_batch_kernel(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        """That kernel, called as `common.execution.gpu.triton_gemv.gemv` is but for weight and bias; None if there is
        none for this number of tokens, or none with a gate."""
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


class PackedLinear(ABC):
    """A linear layer that keeps its weight in an order of its own only."""

    @property
    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The plain weight [out, in], unpacked at every call."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def weights_bytes(self) -> int: ...
