"""FlashAttention over the block table: K and V are read where they lie, and the score matrix is never written.

Algorithm 1 of "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., NeurIPS 2022),
with FlashAttention-2's two changes (Dao, 2023): the outer loop is over queries, and O is divided by l once, at the end.
A tile of K and V is one block of the cache. `fast/` computes the same in kernels.
"""

import torch

from common.batch import RaggedBatch
from stages.m3_paged_kv.kv_tensors import PagedKV

B_R = 64  # Queries of a tile. At most B_R x block_size scores of a head exist at a time.


class FlashAttention:
    """m3's tensors, read block by block; without a gather, and without the full scores."""

    description = "attention: naive, as asked for"

    def __init__(self, kv: PagedKV) -> None:
        self.kv = kv

    def begin(self, batch: RaggedBatch) -> None:
        self._slot_mapping = batch.slot_mapping
        self._tables: list[list[int]] = batch.block_tables.tolist()
        self._sequences = batch.sequences()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq, D]."""
        self.kv.store(layer, k, v, self._slot_mapping)
        keys, values = self.kv.blocks[layer]
        return flash_attention(q, keys, values, self._tables, self._sequences)

    def kv_bytes(self) -> int:
        return self.kv.nbytes()


def flash_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: list[list[int]],
    sequences: list[tuple[int, int, int]],
) -> torch.Tensor:
    """q [T, Hq, D], keys and values [num_blocks, block_size, Hkv, D], a block table and (first token, end of tokens,
    context length) of each sequence; returns [T, Hq, D]."""
    out = torch.zeros_like(q)
    for table, (start, end, length) in zip(tables, sequences, strict=True):
        for i in range(start, end, B_R) if length else ():  # padding of execution has no context
            Q_i = q[i : min(i + B_R, end)]
            out[i : i + len(Q_i)] = attend_blocks(Q_i, length - end + i, keys, values, table)
    return out


def attend_blocks(
    Q_i: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor, table: list[int]
) -> torch.Tensor:
    """Queries [n, Hq, D] at positions first ... first + n - 1, over the blocks that they may see; [n, Hq, D]."""
    n, heads, dim = Q_i.shape
    size, kv_heads = keys.shape[1:3]
    accumulate = torch.promote_types(Q_i.dtype, torch.float32)
    Q_i = (Q_i.to(accumulate) * dim**-0.5).view(n, kv_heads, -1, dim).permute(1, 2, 0, 3)  # [Hkv, group, n, D]
    rows = torch.arange(first, first + n, device=Q_i.device)  # positions of these queries
    O_i = torch.zeros_like(Q_i)  # line 2: the sum over V so far, not yet divided ...
    l_i = Q_i.new_zeros(*Q_i.shape[:3], 1)  # ... the sum of exponentials by which it will be divided ...
    m_i = torch.full_like(l_i, -torch.inf)  # ... and the largest score, which both are relative to
    for j in range(0, first + n, size):  # line 5: blocks behind the diagonal are never touched
        block = table[j // size]
        K_j, V_j = (x[block, : first + n - j].to(accumulate).transpose(0, 1)[:, None] for x in (keys, values))
        S_ij = Q_i @ K_j.transpose(-2, -1)  # line 9
        columns = torch.arange(j, j + K_j.shape[2], device=Q_i.device)
        S_ij = S_ij.masked_fill(columns > rows[:, None], -torch.inf)
        m_new = torch.maximum(m_i, S_ij.amax(-1, keepdim=True))  # lines 10 and 11
        P_ij = (S_ij - m_new).exp()
        # The online softmax: what was summed relative to the old maximum is brought to the new one.
        rescale = (m_i - m_new).exp()
        l_i = rescale * l_i + P_ij.sum(-1, keepdim=True)
        O_i = rescale * O_i + P_ij @ V_j  # line 12
        m_i = m_new
    return (O_i / l_i).permute(2, 0, 1, 3).reshape(n, heads, dim).to(keys.dtype)
