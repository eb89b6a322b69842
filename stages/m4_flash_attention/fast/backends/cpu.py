"""Compiled CPU kernels (Numba) over the blocks in place. The first use on a machine compiles for some seconds."""

import importlib.util

import numpy as np
import torch

from common.batch import RaggedBatch
from common.execution.cpu.arrays import BITS, NUMBA_POOL_LOCK, bits, flat
from common.models.layers import RMSNorm
from common.models.ops import Heads
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend

AUTO = {"cpu": 0}
WHY = "reads the blocks in place; of those measured on a CPU the fastest"
CAPTURABLE = True
FEW_TOKENS = 3  # of more, each thread rotates and stores a share: most are those of the sequences it then attends to


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


class CpuBackend(Backend):
    """Threads: as many as PyTorch uses; the two pools take turns, so they do not compete for cores."""

    def __init__(self, shape: AttentionShape) -> None:
        from common.execution.cpu import simd, simd_products
        from stages.m4_flash_attention.fast.kernels import cpu_decode, cpu_prefill, cpu_store

        self._decode, self._prefill = cpu_decode.decode, cpu_prefill.prefill
        self._store, self._store_in_threads = cpu_store.rotate_and_store, cpu_store.rotate_and_store_in_threads
        self._heads, self._group, self._block_size = shape.num_kv_heads, shape.group, shape.block_size
        self._row_width, self._half_width = simd.width(shape.head_dim), simd.width(shape.head_dim // 2)
        self._rotates = shape.head_dim % 32 == 0  # half a head is whole vectors
        self._column_width = simd.width(next(n for n in (64, 32, 16) if shape.head_dim % n == 0))
        self._tile_queries = max(1, cpu_prefill.ROWS // shape.group)
        pairs = shape.dtype == torch.bfloat16 and simd_products.multiplies_bfloat16()
        self._number = np.empty(0, np.uint32 if pairs else np.float32)
        self._layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._no_norm = bits(torch.empty(0, dtype=shape.dtype))
        self._norms: dict[RMSNorm, tuple[np.ndarray, np.ndarray, float]] = {}

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = step = batch
        self._threads = torch.get_num_threads()
        decodes = step.num_decodes
        self._tables, self._lengths = step.block_tables.numpy(), step.seq_lens.numpy()
        self._starts, self._slots = step.query_start_loc.numpy(), step.slot_mapping.numpy()
        self._angles: tuple[np.ndarray, np.ndarray] | None = None
        # Tiles of queries, dearest first. Threads take them in turn, every second turn in the reverse order.
        tiles = [
            (length - (end - start) + first, sequence, first)
            for sequence, (start, end, length) in enumerate(step.sequences(decodes))
            for first in range(0, end - start, self._tile_queries)
        ]
        tiles.sort(reverse=True)
        tasks = [(sequence, head, first) for _, sequence, first in tiles for head in range(self._heads)]
        for turn in range(self._threads, len(tasks), 2 * self._threads):
            tasks[turn : turn + self._threads] = tasks[turn : turn + self._threads][::-1]
        self._tasks = np.array(tasks, dtype=np.int64).reshape(-1, 3)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(q.shape)
        self._attend(q.data_ptr(), q.stride(0), *self._layer(kv), out.data_ptr())
        return out

    def fuses_qkv(self) -> bool:
        return self._rotates

    def fused_qkv(
        self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        qkv = qkv if qkv.is_contiguous() else qkv.contiguous()
        tokens, heads, dim = qkv.shape
        num_q, num_kv = heads - 2 * self._heads, self._heads
        keys, values = self._layer(kv)
        if self._angles is None:  # the same for all layers of a step
            self._angles = flat(cos), flat(sin)
        shared = qkv.data_ptr(), *self._angles, cos.stride(0), *self._norms_of(layer), self._slots
        sizes = num_q, num_kv, self._row_width, self._half_width
        if tokens <= FEW_TOKENS:
            self._store(*shared, 0, tokens, *sizes, keys, values)
        else:
            with NUMBA_POOL_LOCK:
                self._store_in_threads(*shared, tokens, *sizes, self._threads, keys, values)
        out = qkv.new_empty(tokens, num_q, dim)
        self._attend(qkv.data_ptr(), heads * dim, keys, values, out.data_ptr())
        return out

    def _norms_of(self, layer: Heads) -> tuple[np.ndarray, np.ndarray, float]:
        """Weights of a layer's norms of queries and keys, without numbers where it has none, and eps; made once."""
        q, k = layer.q_norm, layer.k_norm
        if q is None or k is None:
            return self._no_norm, self._no_norm, 0.0
        if q not in self._norms:
            self._norms[q] = bits(q.weight), bits(k.weight), q.eps
        return self._norms[q]

    def _attend(self, q: int, stride: int, keys: np.ndarray, values: np.ndarray, out: int) -> None:
        """q and out: addresses, of queries that lie `stride` numbers apart and of [T, Hq, D]."""
        decodes = self._batch.num_decodes
        with NUMBA_POOL_LOCK:
            if decodes:
                self._decode(
                    q, stride, keys, values, self._tables, self._lengths[:decodes], self._block_size, self._heads,
                    self._group, self._row_width, self._threads, out,
                )  # fmt: skip
            if decodes < self._batch.num_seqs:
                self._prefill(
                    q, stride, keys, values, self._tables[decodes:], self._lengths[decodes:],
                    self._starts[decodes:], self._tasks, self._block_size, self._heads, self._group, self._row_width,
                    self._column_width, self._threads, self._number, out,
                )  # fmt: skip

    def _layer(self, kv: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys and values for the kernels; the views are made once."""
        address = kv.data_ptr()
        if address not in self._layers:
            self._layers[address] = flat(kv[0]), flat(kv[1])
        return self._layers[address]


create = CpuBackend
