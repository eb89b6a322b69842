"""From the qkv projection to the result of attention in one go, where the attention has a kernel for that."""

from typing import Protocol

import torch

from common.models.ops import Attend, Heads, Ops


class FusedQkv(Protocol):
    """An attention that can do its neighbours' work. No attention has to."""

    fuses_qkv: bool  # can it, in the step that has begun?

    def fused_qkv(self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """qkv [T, Hq + 2 Hkv, D], straight from the projection: QK-norm, RoPE, the KV store and attention in one
        kernel; returns [T, Hq, D]."""
        ...


class FusingOps(Ops):
    """Operations that let the attention that `attend` belongs to do its neighbours' work."""

    def attention(
        self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        owner: FusedQkv | None = getattr(attend, "__self__", None)
        if owner is not None and getattr(owner, "fuses_qkv", False):
            return owner.fused_qkv(layer, qkv, cos, sin)
        return super().attention(layer, qkv, cos, sin, attend)
