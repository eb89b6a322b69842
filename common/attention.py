"""The one seam between the model and a stage."""

from typing import Protocol

import torch

from common.batch import RaggedBatch


class Attention(Protocol):
    """Owns the KV tensors: stores new keys and values, reads the old ones."""

    def begin(self, batch: RaggedBatch) -> None:
        """Once a step, before the first layer: prepare what all layers share (masks, indices)."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], with QK-norm and rotary embedding applied; returns [T, Hq, D]."""
        ...

    def kv_bytes(self) -> int:
        """Bytes allocated for K and V of all layers."""
        ...
