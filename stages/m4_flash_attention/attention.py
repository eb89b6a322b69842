"""Attention that reads the blocks in place and never writes the score matrix."""

from __future__ import annotations

import torch

from common.batch import RaggedBatch
from common.models.decoder import AttendRaw, DecoderLayer
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.backends import AttendsRaw
from stages.m4_flash_attention.select import Choice


class FlashAttention:
    """The chosen backend reads the blocks where they lie, whoever wrote them; K and V stay in m3's tensors."""

    def __init__(self, kv: PagedKV, choice: Choice) -> None:
        self.kv = kv
        self.description = choice.reason
        self._backend = choice.backend
        self._layers = list(kv.blocks)  # indexing a tensor costs microseconds, in every layer of every step

    def begin(self, batch: RaggedBatch) -> None:
        self._backend.begin(batch)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v first, for the whole batch: tokens of one step may share a block, and see each other."""
        kv = self._layers[layer]
        self._backend.store(kv, k, v)
        return self._backend.attend(q, kv)

    def raw_kernel(self) -> AttendRaw | None:
        return self.attend_raw if isinstance(self._backend, AttendsRaw) and self._backend.takes_raw() else None

    def attend_raw(self, layer: DecoderLayer, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The same from heads that are neither normalised nor rotated yet, where `raw_kernel` says so."""
        assert isinstance(self._backend, AttendsRaw)
        return self._backend.attend_raw(layer, qkv, cos, sin, self._layers[layer.index])

    def kv_bytes(self) -> int:
        return self.kv.nbytes()
