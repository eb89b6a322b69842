"""The one seam between the model and a stage."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from common.batch import RaggedBatch
from common.models.decoder import AttendRaw, Decoder


class Attention(Protocol):
    """Owns the KV tensors: stores new keys and values, reads the old ones."""

    def begin(self, batch: RaggedBatch) -> None:
        """Once a step, before the first layer: prepare what all layers share (masks, indices)."""
        ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], with QK-norm and rotary embedding applied; returns [T, Hq, D]."""
        ...

    def kv_bytes(self) -> int:
        """Bytes allocated for K and V of all layers."""
        ...


@runtime_checkable
class TakesRaw(Protocol):
    """An attention with a kernel that also normalises and rotates queries and keys. No attention has to."""

    def raw_kernel(self) -> AttendRaw | None:
        """That kernel; None: there is none for the step that has begun."""
        ...


def raw_kernel(attention: Attention, model: Decoder) -> AttendRaw | None:
    """Asked after `begin`, where the model's operations are fused; None: the model normalises and rotates."""
    return attention.raw_kernel() if model.ops.fused and isinstance(attention, TakesRaw) else None


def description(attention: Attention) -> str | None:
    """One line for the user, where the attention has a choice to account for: its `description`. Else None."""
    return getattr(attention, "description", None)
