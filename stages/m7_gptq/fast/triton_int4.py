"""A 4-bit weight on a GPU: our Triton kernels, each for the number of tokens that suits it."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from common.execution.gpu.launch import launch_options
from common.models.quantized_weight import QuantizedWeight


class TritonInt4Linear:
    """`x @ weight.T + bias` for a 4-bit weight whose groups lie in order.

    One launch for one token, no memory but the result, nothing that depends on numbers on the device: for CUDA graphs.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, pdl: bool = True) -> None:
        from stages.m7_gptq.fast.kernels import triton_int4_dequantize, triton_int4_gemv
        from stages.m7_gptq.fast.kernels.triton_int4_layout import lay_out
        from stages.m7_gptq.fast.kernels.triton_int4_tiles import tiles

        self._gemv, self._tiles, self._dequantize = triton_int4_gemv.gemv, tiles, triton_int4_dequantize.dequantize
        self._gemv_tokens = triton_int4_gemv.GEMV_TOKENS if weight.in_features <= triton_int4_gemv.MOST_INPUTS else 0
        self._tiles_tokens = triton_int4_dequantize.DEQUANTIZE_TOKENS
        self._launch = launch_options(device, pdl)
        self.weight = lay_out(weight, dtype, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        if tokens >= self._tiles_tokens:
            return F.linear(x, self._dequantize(self.weight, x.dtype), self.weight.bias)
        if tokens <= self._gemv_tokens:
            return self._gemv(x, self.weight, self._launch)
        return self._tiles(x, self.weight)

    def small_batch_kernel(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        if tokens > self._gemv_tokens or (gated and self.weight.bias is not None):
            return None
        return partial(self._gemv, weight=self.weight)

    def weights_bytes(self) -> int:
        return self.weight.nbytes()


def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Is the weight, whose groups lie in order, one for this layer?"""
    if dtype not in (torch.bfloat16, torch.float16) or importlib.util.find_spec("triton") is None:
        return False
    from stages.m7_gptq.fast.kernels import triton_int4_layout

    return triton_int4_layout.takes(weight)
