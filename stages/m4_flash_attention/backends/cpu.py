"""Compiled CPU kernels (Numba) over the blocks in place. The first use on a machine compiles for some seconds."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import torch

from common.batch import RaggedBatch
from stages.m4_flash_attention.backends import AttentionShape, PagedBatch, store_rows

BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""What NumPy sees instead of a format that it does not know."""

ONE_AT_A_TIME = threading.Lock()
"""Numba's thread pool must not be entered twice where it is Numba's own (`workqueue`, without OpenMP or TBB)."""


def why_not(shape: AttentionShape) -> str | None:
    if shape.device.type != "cpu":
        return f"it runs on a CPU, and the device is {shape.device}"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed (pip install numba)"
    if shape.dtype not in BITS:
        return f"it knows float32, bfloat16 and float16, not {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim % 16 or shape.head_dim > 256:
        return f"it knows head dimensions up to 256, in steps of 16, not {shape.head_dim}"
    return None


def create(shape: AttentionShape) -> CpuBackend:
    return CpuBackend(shape)


def flat(x: torch.Tensor) -> np.ndarray:
    """The memory that a tensor spans, as one row of its bits; a tensor whose rows lie apart spans the gaps too."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).view(BITS[x.dtype]).numpy()


class CpuBackend:
    """Threads: as many as PyTorch uses; the two pools take turns, so they do not compete for cores."""

    def __init__(self, shape: AttentionShape) -> None:
        from stages.m4_flash_attention.kernels import cpu_decode, cpu_prefill, simd

        self._decode, self._prefill = cpu_decode.decode, cpu_prefill.prefill
        self._heads, self._group, self._block_size = shape.num_kv_heads, shape.group, shape.block_size
        self._row_width = simd.width(shape.head_dim)
        self._column_width = simd.width(next(n for n in (64, 32, 16) if shape.head_dim % n == 0))
        self._tile_queries = max(1, cpu_prefill.ROWS // shape.group)
        self._layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = step = PagedBatch(batch)
        self._threads = torch.get_num_threads()
        decodes = step.num_decodes
        self._tables, self._lengths = step.tables.numpy(), step.seq_lens.numpy()
        self._starts = step.query_starts.numpy()
        # Tiles of queries, dearest first: threads take them in turn.
        tiles = [
            (length - (end - start) + first, sequence, first)
            for sequence, (start, end, length) in enumerate(step.sequences(decodes))
            for first in range(0, end - start, self._tile_queries)
        ]
        tiles.sort(reverse=True)
        tasks = [(sequence, head, first) for _, sequence, first in tiles for head in range(self._heads)]
        self._tasks = np.array(tasks, dtype=np.int64).reshape(-1, 3)

    def store(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        store_rows(kv, k, v, self._batch.slots)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        decodes, stride = self._batch.num_decodes, q.stride(0)
        keys, values = self._layer(kv)
        rows, result = flat(q), flat(out)
        with ONE_AT_A_TIME:
            if decodes:
                self._decode(
                    rows, stride, keys, values, self._tables, self._lengths[:decodes], self._block_size, self._heads,
                    self._group, self._row_width, self._threads, result,
                )  # fmt: skip
            if decodes < self._batch.num_seqs:
                self._prefill(
                    rows, stride, keys, values, self._tables[decodes:], self._lengths[decodes:],
                    self._starts[decodes:], self._tasks, self._block_size, self._heads, self._group, self._row_width,
                    self._column_width, self._threads, result,
                )  # fmt: skip
        return out

    def _layer(self, kv: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys and values for the kernels; the views are made once."""
        address = kv.data_ptr()
        if address not in self._layers:
            self._layers[address] = flat(kv[0]), flat(kv[1])
        return self._layers[address]
