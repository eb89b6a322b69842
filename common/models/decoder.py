"""The one model of all eight stages: a Llama, Qwen2 or Qwen3 decoder over flattened tokens."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from common.models.config import ModelConfig
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear, Projection
from common.models.ops import Attend, Ops

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # The linear layers of a `DecoderLayer`


@dataclass
class DecoderLayer:
    """Attention and MLP, each behind a norm and with a residual. q_norm and k_norm: of heads, only in Qwen3."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    input_norm: RMSNorm
    qkv_proj: Projection
    o_proj: Projection
    post_attention_norm: RMSNorm
    gate_up_proj: Projection
    down_proj: Projection
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    next_norm: RMSNorm | None = None  # of the layer behind this one

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, ops: Ops) -> torch.Tensor:
        """x [T, hidden], which is used up; cos and signed sin [T, 1, D] of the tokens' positions."""
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = ops.norm_linear(x, self.input_norm, self.qkv_proj).view(-1, heads, self.head_dim)
        seen = ops.attention(self, qkv, cos, sin, attend)
        seen = seen.reshape(-1, self.num_heads * self.head_dim)
        x = ops.residual_linear(x, self.o_proj, seen, self.post_attention_norm)
        wide = ops.norm_swiglu(x, self.post_attention_norm, self.gate_up_proj)
        return ops.residual_linear(x, self.down_proj, wide, self.next_norm)

    def weights_bytes(self) -> int:
        norms = (self.input_norm, self.post_attention_norm, self.q_norm, self.k_norm)
        projections = sum(getattr(self, name).weights_bytes() for name in PROJECTIONS)
        return projections + sum(norm.weight.nbytes for norm in norms if norm is not None)


class Decoder:
    """`model(input_ids [T], positions [T], attend)` gives hidden states [T, hidden]; `logits` normalises rows of them
    and turns them into logits. The tokens of all sequences are laid end to end: only `attend` knows where one ends.

    `head` is the output projection; with tied embeddings it multiplies by the embedding. `ops` computes everything but
    attention, in plain PyTorch or fused kernels. `note`: what a reader of its figures must know about its weights.
    """

    splits_vocabulary = False  # over several ranks

    def __init__(
        self, config: ModelConfig, embedding: torch.Tensor, layers: list[DecoderLayer], norm: RMSNorm, head: Projection
    ) -> None:
        self.config = config
        self.device, self.dtype = embedding.device, embedding.dtype
        self.embedding = embedding
        self.layers = layers
        for layer, following in pairwise(layers):
            layer.next_norm = following.input_norm
        self.norm = norm
        self.head = head
        self.ops = Ops()
        self.note: str | None = None

    @cached_property
    def rotary(self) -> RotaryEmbedding:
        """An engine's has as many positions as its `max_model_len`: `prepare` sets it."""
        return RotaryEmbedding(self.config, self.dtype, self.device, min(self.config.max_position_embeddings, 65536))

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [T, hidden] before the final norm; positions count from 0 within each sequence."""
        x, cos, sin = self.embed(input_ids, positions)
        for layer in self.layers:
            x = layer(x, cos, sin, attend, self.ops)
        return x

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the layers start from: see `Ops.embed`."""
        return self.ops.embed(input_ids, positions, self.embedding, self.rotary)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] to [N, vocab], in the model's dtype: pass only the rows that are sampled."""
        return self.ops.norm_linear(hidden, self.norm, self.head)

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """The token with the largest of each row's logits, [N, hidden] to [N]."""
        return self.ops.sample(self.logits(hidden))

    def agree(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The tokens drawn, on all ranks that hold the model."""
        return token_ids

    def weights_bytes(self) -> int:
        """Bytes of all weights. An embedding that is also the head counts once, unless the head holds its own copy."""
        head_is_embedding = isinstance(self.head, Linear) and self.head.weight is self.embedding
        head = 0 if head_is_embedding else self.head.weights_bytes()
        layers = sum(layer.weights_bytes() for layer in self.layers)
        return self.embedding.nbytes + layers + self.norm.weight.nbytes + head
