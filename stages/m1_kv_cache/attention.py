"""m0's formula, with keys and values taken from the cache: the queries are only those of the new tokens."""

import torch

from common.batch import RaggedBatch
from common.memory import allocate_kv
from common.models import Decoder


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
        self._future = (slots > self._positions[..., None])[:, None, None]  # [B, 1, 1, L, context]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] with T = rows * length; returns [T, Hq, D]."""
        shape = self._positions.shape  # [B, L]
        keys, values = self._kv[layer, :, : shape[0]]  # each [B, Hkv, row_length, D]
        at = (self._rows, slice(None), self._positions)
        keys[at], values[at] = k.unflatten(0, shape), v.unflatten(0, shape)
        keys, values = keys[:, :, : self._context], values[:, :, : self._context]

        # The query heads that share a key-value head lie together, so that K and V are never repeated.
        (rows, length), (heads, dim) = shape, q.shape[1:]
        queries = (q * dim**-0.5).unflatten(0, shape).transpose(1, 2)  # [B, Hq, L, D]
        queries = queries.reshape(rows, k.shape[1], -1, dim)  # [B, Hkv, group * L, D]
        scores = (queries @ keys.transpose(-2, -1)).view(rows, k.shape[1], -1, length, self._context)
        scores = scores.masked_fill(self._future, -torch.inf)  # [B, Hkv, group, L, context]
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype).flatten(2, 3)
        out = (weights @ values).view(rows, heads, length, dim)
        return out.transpose(1, 2).reshape(-1, heads, dim)

    def kv_bytes(self) -> int:
        return self._kv.nbytes
