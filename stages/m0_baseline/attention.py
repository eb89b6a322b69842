"""Attention as the formula is written: softmax(Q Kᵀ / √d) V, with the whole score matrix in memory."""

import torch

from common.batch import RaggedBatch


class FullAttention:
    """Vaswani et al. 2017, equation 1, causal, over the padded rows of a static batch. Remembers nothing."""

    def begin(self, batch: RaggedBatch) -> None:
        length = batch.max_query_len
        future = torch.ones(length, length, dtype=torch.bool, device=batch.input_ids.device).triu(diagonal=1)
        self._rows, self._length, self._future = batch.num_seqs, length, future

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] with T = rows * length; returns [T, Hq, D]."""
        q, k, v = (x.unflatten(0, (self._rows, self._length)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
        group = q.shape[1] // k.shape[1]  # grouped-query attention: query heads that share one key-value head
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, Hq, L, L]
        scores = scores.masked_fill(self._future, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        return (weights @ v).transpose(1, 2).flatten(0, 1)

    def kv_bytes(self) -> int:
        return 0
