"""The operations of `Ops` that PyTorch makes of many calls on a CPU, each as one compiled kernel (Numba). The matrix
products stay the library's; queries and keys are normalised and rotated by the attention that stores them, where it
can (`fused_qkv`). The first use on a machine compiles for some seconds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.execution.cpu import cpu_elementwise as kernels
from common.execution.cpu.arrays import BITS, NUMBA_POOL_LOCK, bits
from common.execution.cpu.simd import lanes_for
from common.execution.fused_qkv import FusingOps
from common.models.layers import RMSNorm

Kernel = Callable[..., None]
Lanes = tuple[int, ...]

SINGLE_THREAD_LIMIT = 1 << 15  # up to this many numbers, waking other threads costs more than it saves
FORMATS = {dtype: bits(torch.empty(0, dtype=dtype)) for dtype in BITS}


def _takes(*tensors: torch.Tensor) -> bool:
    """The kernels get addresses and look at nothing else, so whatever they do not expect is the definition's."""
    dtype = tensors[0].dtype
    return dtype in BITS and all(x.dtype == dtype and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def _run(
    alone: Kernel, in_threads: Kernel, given: tuple[Any, ...], rows: int, size: int, lanes: Lanes, out: torch.Tensor
) -> None:
    """A kernel over all rows of `out`, [rows, size], by one thread or by as many as PyTorch uses."""
    if out.numel() <= SINGLE_THREAD_LIMIT:
        alone(*given, 0, rows, size, lanes, out.data_ptr())
    else:
        with NUMBA_POOL_LOCK:
            in_threads(*given, rows, size, lanes, torch.get_num_threads(), out.data_ptr())


class CompiledOps(FusingOps):
    """The same numbers as the definition, but for the order of a sum."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        size = x.shape[-1]
        lanes = lanes_for(size)
        if lanes is None or not _takes(x, norm.weight) or norm.weight.numel() != size:
            return norm(x)
        out = torch.empty_like(x)
        given = x.data_ptr(), self._bits_of(norm.weight), norm.eps
        _run(kernels.norm, kernels.norm_in_threads, given, x.numel() // size, size, lanes, out)
        return out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, size = len(gate_up), gate_up.shape[-1] // 2
        lanes = lanes_for(size)
        if lanes is None or not _takes(gate_up) or gate_up.dim() != 2 or gate_up.shape[-1] % 2:
            return super().swiglu(gate_up)
        out = gate_up.new_empty(rows, size)
        given = gate_up.data_ptr(), FORMATS[gate_up.dtype]
        _run(kernels.swiglu, kernels.swiglu_in_threads, given, rows, size, lanes, out)
        return out

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        lanes = lanes_for(logits.shape[-1])
        if temperature is not None or lanes is None or not _takes(logits) or not logits.numel():
            return super().sample(logits, temperature, noise)
        (rows, size), out = logits.shape, torch.empty(len(logits), dtype=torch.long)
        threads = min(rows, torch.get_num_threads())
        with NUMBA_POOL_LOCK:
            kernels.argmax(logits.data_ptr(), FORMATS[logits.dtype], rows, size, lanes, threads, out.numpy())
        return out

    def _bits_of(self, weight: torch.Tensor) -> np.ndarray:
        """Made once; the tensor is kept, so that no other one gets its address."""
        address = weight.data_ptr()
        if address not in self._weights:
            self._weights[address] = weight, bits(weight)
        return self._weights[address][1]
