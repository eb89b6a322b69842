"""The operations of `Ops` as fused kernels: at most `MAX_ROWS` tokens take five launches a layer besides attention.

norm + qkv | QK-norm + rotary | (attention) | o + residual | norm + gate, up + SiLU | down + residual. More tokens take
the library's matrix products, which are at their best there, with fused kernels between them.
"""

from __future__ import annotations

from typing import Any

import torch

from common.kernels import triton_elementwise, triton_gemv, triton_sample
from common.models.layers import RMSNorm
from common.models.linear import Adds, Linear, Projection
from common.models.ops import Ops


class FusedOps(Ops):
    """Safe to capture in a CUDA graph: nothing is read on the host.

    overlap: kernels may start while the one in front of them still runs, where the GPU can do that.
    """

    def __init__(self, device: torch.device, overlap: bool = True) -> None:
        early = overlap and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.launch: dict[str, Any] = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return triton_elementwise.norm(x, norm.weight, norm.eps, self.launch)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_elementwise.swiglu(gate_up, self.launch)

    def norm_linear(self, x: torch.Tensor, norm: RMSNorm, proj: Projection) -> torch.Tensor:
        if isinstance(proj, Linear) and len(x) <= triton_gemv.MAX_ROWS:
            return triton_gemv.gemv(x, proj.weight, self.launch, bias=proj.bias, norm=norm.weight, eps=norm.eps)
        return proj(self.norm(x, norm))

    def norm_swiglu(self, x: torch.Tensor, norm: RMSNorm, gate_up: Projection) -> torch.Tensor:
        if isinstance(gate_up, Linear) and gate_up.bias is None and len(x) <= triton_gemv.MAX_ROWS:
            return triton_gemv.gemv(x, gate_up.weight, self.launch, norm=norm.weight, eps=norm.eps, gated=True)
        return self.swiglu(gate_up(self.norm(x, norm)))

    def add_linear(self, x: torch.Tensor, proj: Projection, y: torch.Tensor) -> torch.Tensor:
        if isinstance(proj, Linear) and len(x) <= triton_gemv.MAX_ROWS:
            return triton_gemv.gemv(y, proj.weight, self.launch, bias=proj.bias, add_to=x)
        return proj.add_to(x, y) if isinstance(proj, Adds) else x + proj(y)

    def norm_rotate(
        self,
        heads: torch.Tensor,
        num_q: int,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        if q_norm is None or k_norm is None:
            return triton_elementwise.norm_rotate(heads, num_q, None, None, 0.0, cos, sin, self.launch)
        weights = (q_norm.weight, k_norm.weight)
        return triton_elementwise.norm_rotate(heads, num_q, *weights, q_norm.eps, cos, sin, self.launch)

    def pick(
        self, logits: torch.Tensor, temperature: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        return triton_sample.pick(logits, temperature, noise, self.launch)
