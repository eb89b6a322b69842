"""Kernels that do their neighbours' work: products with norm, gate and residual, and all from the qkv projection to the
result of attention."""

from collections.abc import Callable
from typing import Protocol

import torch

from common.models.layers import RMSNorm
from common.models.linear import Linear, Projection
from common.models.ops import Attend, Heads, Ops


class FusedQkv(Protocol):
    """An attention that can do its neighbours' work. No attention has to."""

    fuses_qkv: bool  # can it, in the step that has begun?

    def fused_qkv(self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """qkv [T, Hq + 2 Hkv, D], straight from the projection: QK-norm, RoPE, the KV store and attention in one
        kernel; returns [T, Hq, D]."""
        ...


class FusingOps(Ops):
    """Operations that let a projection, and the attention that `attend` belongs to, do their neighbours' work."""

    def product(
        self, proj: Projection, tokens: int, norm: bool = False, gated: bool = False
    ) -> Callable[..., torch.Tensor] | None:
        """The matrix product with its neighbours' work fused in, as `Fuses` says; None if there is none. norm, gated:
        which work that is."""
        kernel = getattr(proj, "small_batch_kernel", None)  # isinstance takes 10 µs to look at a Protocol
        return None if kernel is None else kernel(tokens, gated)

    def norm_linear(self, x: torch.Tensor, norm: RMSNorm, proj: Projection) -> torch.Tensor:
        if (product := self.product(proj, x.shape[0], norm=True)) is not None:
            return product(x, norm=norm.weight, eps=norm.eps)
        return super().norm_linear(x, norm, proj)

    def norm_swiglu(self, x: torch.Tensor, norm: RMSNorm, gate_up: Projection) -> torch.Tensor:
        if (product := self.product(gate_up, x.shape[0], norm=True, gated=True)) is not None:
            return product(x, norm=norm.weight, eps=norm.eps, gated=True)
        return super().norm_swiglu(x, norm, gate_up)

    def residual_linear(
        self, x: torch.Tensor, proj: Projection, y: torch.Tensor, then: RMSNorm | None = None
    ) -> torch.Tensor:
        if (product := self.product(proj, x.shape[0])) is not None:
            return product(y, add_to=x)
        return proj.add_to(x, y) if isinstance(proj, Linear) else x + proj(y)

    def attention(
        self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        owner: FusedQkv | None = getattr(attend, "__self__", None)
        if owner is not None and getattr(owner, "fuses_qkv", False):
            return owner.fused_qkv(layer, qkv, cos, sin)
        return super().attention(layer, qkv, cos, sin, attend)
