"""The operations of `Ops` as fused kernels. With few tokens a layer takes five launches and attention:

norm + qkv | QK-norm + rotary | (attention) | o + residual | norm + gate, up + SiLU | down + residual

Each kind of product has its number of tokens: `triton_gemv` one, `triton_skinny` up to 32, `triton_batch` up to 128.
More take the library's, which are at their best there, with fused kernels between them. An attention with a `fused_qkv`
does the second of these itself.
"""

from collections.abc import Callable
from functools import partial

import torch

from common.execution.draws import Draws, Kind
from common.execution.fused_qkv import FusingOps
from common.execution.gpu import triton_batch, triton_draw, triton_elementwise, triton_gemv, triton_skinny
from common.execution.gpu.launch import launch_options
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear, Projection


class FusedOps(FusingOps):
    """Safe to capture in a CUDA graph: nothing is read on the host.

    pdl: kernels may start while the one in front of them still runs, where the GPU can do that.
    """

    def __init__(self, device: torch.device, pdl: bool = True) -> None:
        self.launch = launch_options(device, pdl)
        self._normed: triton_batch.Normed | None = None  # the residual stream, where its next norm is known

    def embed(
        self, input_ids: torch.Tensor, positions: torch.Tensor, embedding: torch.Tensor, rotary: RotaryEmbedding
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return triton_elementwise.embed(input_ids, positions, embedding, rotary.table, self.launch)

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return triton_elementwise.norm(x, norm.weight, norm.eps, self.launch)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_elementwise.swiglu(gate_up, self.launch)

    def product(
        self, proj: Projection, tokens: int, norm: bool = False, gated: bool = False
    ) -> Callable[..., torch.Tensor] | None:
        if isinstance(proj, Linear) and not (gated and proj.bias is not None):
            given = {"weight": proj.weight, "bias": proj.bias, "launch": self.launch}
            if (config := triton_skinny.skinny_config(proj.weight, tokens, norm, gated)) is not None:
                return partial(triton_skinny.skinny, config=config, **given)
            if tokens == 1:
                return partial(triton_gemv.gemv, **given)
            if (wide := triton_batch.batch_config(proj.weight, tokens)) is not None:
                return partial(triton_batch.batch, config=wide, normed=self._normed, **given)
        kernel = super().product(proj, tokens, norm, gated)
        return None if kernel is None else partial(kernel, launch=self.launch)

    def residual_linear(
        self, x: torch.Tensor, proj: Projection, y: torch.Tensor, then: RMSNorm | None = None
    ) -> torch.Tensor:
        self._normed = None
        if then is None or not isinstance(proj, Linear) or not triton_batch.splits(proj.weight, proj.bias, len(x)):
            return super().residual_linear(x, proj, y)
        parts = triton_batch.split_batch(y, proj.weight, self.launch)
        result = triton_elementwise.add_norm(x, parts, then.weight, then.eps, self.launch)
        self._normed = triton_batch.Normed(x, then.weight, result)
        return x

    def qk_norm_rope(
        self, heads: torch.Tensor, num_q: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        norms = (None, None, 0.0)
        if q_norm is not None and k_norm is not None:
            norms = (q_norm.weight, k_norm.weight, q_norm.eps)
        return triton_elementwise.qk_norm_rope(heads, num_q, *norms, cos, sin, self.launch)

    def draw(self, logits: torch.Tensor, draws: Draws, kind: Kind) -> None:
        triton_draw.draw(logits, draws, kind, self.launch)
