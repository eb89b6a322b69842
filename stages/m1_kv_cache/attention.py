"""m0's formula, with keys and values taken from the cache: the queries are only those of the new tokens."""

import torch

from common.batch import RaggedBatch
from common.memory import allocate_kv
from common.models import Decoder


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """softmax(Q Kᵀ / √d) V: q [B, L, Hq, D], k and v [B, Hkv, C, D], masked (what a query may not see) [B, L, C]
    or broadcastable; returns [B, L, Hq, D]. The query heads that share a KV head lie together: K and V are never
    repeated."""
    batch, length, heads, dim = q.shape
    kv_heads, context = k.shape[1:3]
    queries = (q * dim**-0.5).transpose(1, 2).reshape(batch, kv_heads, -1, dim)  # [B, Hkv, group * L, D]
    scores = (queries @ k.transpose(-2, -1)).view(batch, kv_heads, -1, length, context)
    scores = scores.masked_fill(masked[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype).flatten(2, 3)
    return (weights @ v).view(batch, heads, length, dim).transpose(1, 2)


class RowAttention:
    """K and V of all layers in one tensor [layers, 2, rows, Hkv, row_length, D], allocated once."""

    def __init__(self, model: Decoder, num_rows: int, row_length: int) -> None:
        c = model.config
        shape = (c.num_layers, 2, num_rows, c.num_kv_heads, row_length, c.head_dim)
        self._kv = allocate_kv(shape, model.dtype, model.device)

    def begin(self, batch: RaggedBatch) -> None:
        device = batch.positions.device
        self._positions = batch.positions.unflatten(0, (batch.num_seqs, batch.max_query_len))  # [B, L]
        self._rows = torch.arange(batch.num_seqs, device=device)[:, None]  # a static batch fills the rows in order
        self._context = batch.max_seq_len
        slots = torch.arange(self._context, device=device)
        self._future = slots > self._positions[..., None]  # [B, L, context]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] with T = rows * length; returns [T, Hq, D]."""
        shape = self._positions.shape  # [B, L]
        keys, values = self._kv[layer, :, : shape[0]]  # each [B, Hkv, row_length, D]
        at = (self._rows, slice(None), self._positions)
        keys[at], values[at] = k.unflatten(0, shape), v.unflatten(0, shape)
        keys, values = keys[:, :, : self._context], values[:, :, : self._context]
        return full_attention(q.unflatten(0, shape), keys, values, self._future).flatten(0, 1)

    def kv_bytes(self) -> int:
        return self._kv.nbytes
