"""A 4-bit weight on a GPU: our Triton kernels, each for the number of tokens that suits it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from common.models.packed import QuantizedWeight


class TritonInt4Linear:
    """`x @ weight.T + bias` for a 4-bit weight whose groups lie in order.

    One launch for one token, nothing allocated but the result, nothing that depends on a number on the device: a CUDA
    graph may hold it.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> None:
        from stages.m7_gptq.kernels import triton_config, triton_dequantize, triton_gemv, triton_layout, triton_tiles

        self._gemv, self._tiles, self._dequantize = (
            triton_gemv.gemv,
            triton_tiles.tiles,
            triton_dequantize.dequantize,
        )
        self._gemv_tokens, self._tiles_tokens = triton_config.GEMV_TOKENS, triton_config.DEQUANTIZE_TOKENS
        self.weight = triton_layout.lay_out(weight, dtype, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        if tokens >= self._tiles_tokens:
            return F.linear(x, self._dequantize(self.weight, x.dtype), self.weight.bias)
        if tokens <= self._gemv_tokens:
            return self._gemv(x, self.weight, {"EARLY": False})
        return self._tiles(x, self.weight)

    def fuses(self, tokens: int, gated: bool) -> bool:
        return tokens <= self._gemv_tokens and not (gated and self.weight.bias is not None)

    def fused(
        self,
        x: torch.Tensor,
        launch: dict[str, Any],
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._gemv(x, self.weight, launch, norm=norm, eps=eps, gated=gated, add_to=add_to)

    def weights_bytes(self) -> int:
        return self.weight.nbytes()


def why_not(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """What keeps this layer from a weight whose groups lie in order."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from stages.m7_gptq.kernels import triton_layout

    return triton_layout.why_not(weight)
