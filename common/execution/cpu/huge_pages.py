"""Memory for weights that are read from end to end at every step.

In pages of 4 KB a core looks up one address for each 64 cache lines, and its prefetcher stops at each page's end: of
what the memory can deliver, a third is lost. In huge pages (2 MB, Linux) it is not. NumPy asks the kernel for them when
an array has 4 MB or more, so weights are copied, one after the other, into large arrays.
"""

import threading

import numpy as np
import torch

CHUNK = 1 << 25  # bytes that are asked for at once; what is never written takes no memory
LINE = 64  # bytes of a cache line, at a multiple of which each tensor begins


class HugePages:
    """Copies of tensors; a chunk lives as long as one of the tensors in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, of any dtype, without gaps."""
        size = tensor.nbytes
        with self._lock:
            if self._free.numel() < size + LINE:
                self._free = torch.from_numpy(np.empty(max(CHUNK, size + 2 * LINE), np.uint8))
            begin = -self._free.data_ptr() % LINE
            place, self._free = self._free[begin : begin + size], self._free[begin + size :]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


huge_pages = HugePages()
