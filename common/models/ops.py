"""What a decoder computes around its attention, as nine operations: their definition, in plain PyTorch.
`common.execution.choose` has the same as fused kernels for a GPU (`gpu.fused`) and some of them for a CPU
(`cpu.fused_cpu`); tests hold them together."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from common.models.layers import RMSNorm, RotaryEmbedding, rotate, swiglu
from common.models.linear import Projection

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D]: the seam between model and stage."""


class Heads(Protocol):
    """What attention has to know of a layer; q_norm and k_norm where the model normalises heads (Qwen3)."""

    index: int
    num_heads: int
    num_kv_heads: int
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None


class Ops:
    """Handed to the decoder, which hands it to its layers. T tokens; x [T, hidden] is the residual stream."""

    def embed(
        self, input_ids: torch.Tensor, positions: torch.Tensor, embedding: torch.Tensor, rotary: RotaryEmbedding
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the layers start from, of tokens and positions [T]: x [T, hidden], and cos and signed sin [T, 1, D]."""
        return F.embedding(input_ids, embedding), *rotary.at(positions)

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """[T, N] to [T, N]."""
        return norm(x)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half: [T, 2 * intermediate] to [T, intermediate]."""
        return swiglu(gate_up)

    def norm_linear(self, x: torch.Tensor, norm: RMSNorm, proj: Projection) -> torch.Tensor:
        """proj(norm(x)): [T, hidden] to [T, out]."""
        return proj(self.norm(x, norm))

    def norm_swiglu(self, x: torch.Tensor, norm: RMSNorm, gate_up: Projection) -> torch.Tensor:
        """silu(gate) * up, where gate and up are the halves of gate_up(norm(x)): [T, hidden] to [T, intermediate]."""
        return self.swiglu(gate_up(self.norm(x, norm)))

    def residual_linear(
        self, x: torch.Tensor, proj: Projection, y: torch.Tensor, then: RMSNorm | None = None
    ) -> torch.Tensor:
        """x + proj(y), y [T, in]. May be written over x. then: the norm that comes next, which may be done here."""
        return x + proj(y)

    def qk_norm_rope(
        self, heads: torch.Tensor, num_q: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Queries and keys, [T, Hq + Hkv, D] of which the first `num_q` are queries, each head normalised (where the
        model does that) and turned by cos and signed sin [T, 1, D]. May be written over `heads`."""
        if q_norm is not None and k_norm is not None:
            heads = torch.cat((q_norm(heads[:, :num_q]), k_norm(heads[:, num_q:])), dim=1)
        return rotate(heads, cos, sin)

    def attention(
        self, layer: Heads, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Heads as the projection gives them, [T, Hq + 2 Hkv, D]: queries and keys normalised and rotated, then
        attention; returns [T, Hq, D]."""
        num_q, num_kv = layer.num_heads, layer.num_kv_heads
        qk, v = qkv[:, : num_q + num_kv], qkv[:, num_q + num_kv :]
        qk = self.qk_norm_rope(qk, num_q, layer.q_norm, layer.k_norm, cos, sin)
        return attend(layer.index, qk[:, :num_q], qk[:, num_q:], v)

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One token a row, [S, vocab] to [S].
        temperature [S], float32; 0: the likeliest token, of equals the first; None: 0 for all rows. Otherwise inverse
        transform sampling: the first token at which the cumulative probability exceeds the noise [S], float64."""
        likeliest = argmax(logits)
        if temperature is None or noise is None:
            return likeliest
        probs = (logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]).softmax(dim=-1)
        cumulative = probs.double().cumsum(dim=-1)
        target = noise[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
        return torch.where(temperature > 0, drawn, likeliest)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[S, vocab] to [S]: the first of each row's largest numbers. On a CPU PyTorch's own compares one number after the
    other; NumPy's compares vectors, and takes a fraction of the time."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
