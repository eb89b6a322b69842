"""The output head in 8 bits on a GPU: the fast twin of `QuantizedHead`."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from common.execution.gpu.launch import launch_options
from stages.m7_gptq.head import HeadWeight


class Int8Head:
    """`x @ weight.T` on a GPU, by one kernel for few tokens and another for more: both multiply by the same 8-bit
    weight, so that a token does not depend on how many share its step."""

    def __init__(self, weight: HeadWeight) -> None:
        from stages.m7_gptq.fast.kernels import triton_int8

        self._gemv, self._tiles, self._few = triton_int8.gemv, triton_int8.tiles, triton_int8.GEMV_TOKENS
        self._launch = launch_options(weight.codes.device)
        self.words, self.scales = triton_int8.lay_out(weight.codes), weight.scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self._few:
            return self._gemv(x, self.words, self.scales, self._launch)
        return self._tiles(x, self.words, self.scales)

    def small_batch_kernel(self, tokens: int, gated: bool) -> Callable[..., torch.Tensor] | None:
        if tokens > self._few or gated:
            return None
        return partial(self._gemv, words=self.words, scales=self.scales)

    def weights_bytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


def takes(weight: torch.Tensor) -> bool:
    """Is the weight [vocab, hidden], in 16 bits, one for the kernels?"""
    return weight.device.type == "cuda" and weight.shape[1] % 4 == 0 and importlib.util.find_spec("triton") is not None
