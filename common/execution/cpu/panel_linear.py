"""A linear layer whose weight lies in panels (`simd_products`), with norm, gate and residual in the same call."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.execution.cpu.arrays import NUMBA_POOL_LOCK, bits
from common.execution.cpu.huge_pages import huge_pages
from common.models.linear import PackedLinear

PANEL = 32  # outputs (`simd_products.PANEL`, which imports Numba)
NONE = np.empty(0, np.uint16)  # a norm or a bias that is not there


class PanelProduct:
    """What layers of bfloat16 and of codes share; x and the result are in bfloat16.

    A call takes microseconds before it multiplies, and a token takes a hundred calls: what can be kept, is.
    """

    def __init__(self, kernel: Any, outputs: int, size: int, bias: torch.Tensor | None, *weight: Any) -> None:
        """kernel(x, norm, eps, rows, outputs, gated, add, threads, out, bias, size, lanes, *weight)."""
        from common.execution.cpu.simd import lanes_for  # it imports Numba

        self._kernel, self._outputs, self._size, self.bias = kernel, outputs, size, bias
        self._fixed = NONE if bias is None else bits(bias), size, lanes_for(size), *weight
        self._norm, self._norm_bits = None, NONE

    def small_batch_kernel(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        """`Fuses`, for any number of tokens."""
        return None if gated and self._outputs % (2 * PANEL) else self.__call__

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, in] to [T, out]; the options are those of `Fuses`."""
        shape = x.shape
        if x.dtype != torch.bfloat16 or len(shape) != 2 or shape[1] != self._size:
            return F.linear(x, x.new_empty(self._outputs, self._size, dtype=torch.bfloat16))  # says what is wrong
        if not x.is_contiguous():
            x = x.contiguous()
        rows, outputs = shape[0], self._outputs // 2 if gated else self._outputs
        out = x.new_empty((rows, outputs)) if add_to is None else add_to
        if norm is not self._norm:
            self._norm, self._norm_bits = norm, NONE if norm is None else bits(norm)
        if rows:
            with NUMBA_POOL_LOCK:
                self._kernel(
                    x.data_ptr(), self._norm_bits, eps, rows, outputs, gated, add_to is not None,
                    torch.get_num_threads(), out.data_ptr(), *self._fixed,
                )  # fmt: skip
        return out


class PanelLinear(PanelProduct, PackedLinear):
    """`x @ weight.T + bias` for a CPU with AVX-512's products of bfloat16, the same for one row and for many."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        from common.execution.cpu import cpu_packed

        outputs, size = weight.shape
        panels = weight.view(outputs // PANEL, 2, PANEL // 2, size // 2, 2)
        self._packed = huge_pages.copy(panels.permute(0, 3, 1, 2, 4))
        super().__init__(cpu_packed.linear, outputs, size, bias, bits(self._packed.flatten()))

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Is it made of whole panels, and has this CPU the instruction?"""
        if importlib.util.find_spec("numba") is None or weight.shape[0] % PANEL or weight.shape[1] % 16:
            return False
        from common.execution.cpu.simd_products import multiplies_bfloat16

        return multiplies_bfloat16()

    @property
    def weight(self) -> torch.Tensor:
        return self._packed.permute(0, 2, 3, 1, 4).reshape(self._outputs, self._size)

    def weights_bytes(self) -> int:
        return self._packed.nbytes + (0 if self.bias is None else self.bias.nbytes)
