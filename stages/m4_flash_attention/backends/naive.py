"""FlashAttention's forward pass in plain PyTorch: slow, and exactly what the fast kernels do.

Names follow Algorithm 1 of "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al.,
NeurIPS 2022), with two changes of FlashAttention-2 (Dao, 2023): the outer loop is over queries, and O is divided by l
once, at the end.
"""

from __future__ import annotations

import torch

from common.batch import RaggedBatch
from stages.m4_flash_attention.backends import AttentionShape, PagedBatch, store_rows

B_R, B_C = 64, 64  # rows of a tile of Q, rows of a tile of K and V


def why_not(shape: AttentionShape) -> str | None:
    return None


def create(shape: AttentionShape) -> NaiveBackend:
    return NaiveBackend()


def tiled_attention(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Causal attention without ever holding the score matrix: at most B_r x B_c scores exist at a time.

    Q [H, N, D]; K and V [H, S, D] with S >= N: the queries are the last N of the S positions. Returns [H, N, D].
    """
    N, D = Q.shape[1:]
    S = K.shape[1]
    accumulate = torch.promote_types(Q.dtype, torch.float32)
    O = torch.empty_like(Q)  # noqa: E741
    for i in range(0, N, B_R):
        Q_i = Q[:, i : i + B_R].to(accumulate) * D**-0.5
        rows = torch.arange(S - N + i, S - N + i + Q_i.shape[1], device=Q.device)  # positions of these queries
        O_i = torch.zeros_like(Q_i)  # line 2: the sum over V so far, not yet divided ...
        l_i = Q_i.new_zeros(*Q_i.shape[:2], 1)  # ... the sum of exponentials by which it will be divided ...
        m_i = Q_i.new_full((*Q_i.shape[:2], 1), -torch.inf)  # ... and the largest score that both are relative to
        for j in range(0, int(rows[-1]) + 1, B_C):  # line 5: tiles behind the diagonal are never touched
            K_j, V_j = K[:, j : j + B_C].to(accumulate), V[:, j : j + B_C].to(accumulate)
            S_ij = Q_i @ K_j.transpose(-1, -2)  # line 9
            columns = torch.arange(j, j + K_j.shape[1], device=Q.device)
            S_ij = S_ij.masked_fill(columns > rows[:, None], -torch.inf)
            m_new = torch.maximum(m_i, S_ij.amax(-1, keepdim=True))  # lines 10 and 11
            P_ij = (S_ij - m_new).exp()
            # What was summed relative to the old maximum is brought to the new one: this is the online softmax.
            shrink = (m_i - m_new).exp()
            l_i = shrink * l_i + P_ij.sum(-1, keepdim=True)
            O_i = shrink * O_i + P_ij @ V_j  # line 12
            m_i = m_new
        O[:, i : i + B_R] = (O_i / l_i).to(O.dtype)
    return O


class NaiveBackend:
    """Gathers each sequence's blocks, then tiles over them."""

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = PagedBatch(batch)
        self._sequences = self._batch.sequences()

    def store(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        store_rows(kv, k, v, self._batch.slots)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        block_size, kv_heads = kv.shape[2], kv.shape[3]
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        for table, (start, end, length) in zip(self._batch.tables, self._sequences, strict=True):
            if length == 0:  # a padded row
                continue
            blocks = table[: -(-length // block_size)]
            k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in kv)  # [Hkv, length, D]
            k, v = (x.repeat_interleave(q.shape[1] // kv_heads, dim=0) for x in (k, v))
            out[start:end] = tiled_attention(q[start:end].transpose(0, 1), k, v).transpose(0, 1)
        return out
