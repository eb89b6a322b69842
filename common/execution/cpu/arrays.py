"""A tensor's memory as Numba's kernels see it: bits in a NumPy array."""

import threading

import numpy as np
import torch

# What NumPy sees instead of a format that it does not know.
BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
NUMBA_POOL_LOCK = threading.Lock()  # Numba's own thread pool (without OpenMP or TBB) must not be entered twice


def bits(x: torch.Tensor) -> np.ndarray:
    """A tensor without gaps; shares its memory."""
    return x.view(BITS[x.dtype]).numpy()


def flat(x: torch.Tensor) -> np.ndarray:
    """The memory that a tensor spans, as one row of its bits; a tensor whose rows lie apart spans the gaps too."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return bits(x.as_strided((span,), (1,)))
