"""`FlashAttention` by a backend."""

import torch

from common.batch import RaggedBatch
from common.models.ops import Heads
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.fast.select import Choice


class BackendAttention:
    """The chosen backend reads the blocks where they lie; K and V stay in m3's tensors."""

    def __init__(self, kv: PagedKV, choice: Choice) -> None:
        self.kv = kv
        self.description = choice.reason
        self.fuses_qkv = False
        self._backend = choice.backend
        self._layers = list(kv.blocks)  # indexing a tensor costs microseconds, in every layer of every step

    def begin(self, batch: RaggedBatch) -> None:
        self._backend.begin(batch)
        self.fuses_qkv = self._backend.fuses_qkv()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v first, for the whole batch: tokens of one step may share a block, and see each other."""
        kv = self._layers[layer]
        self._backend.store(kv, k, v)
        return self._backend.attend(q, kv)

    def fused_qkv(self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """In steps with `fuses_qkv`: see `common.execution.fused_qkv`."""
        return self._backend.fused_qkv(layer, qkv, cos, sin, self._layers[layer.index])

    def kv_bytes(self) -> int:
        return self.kv.nbytes()
