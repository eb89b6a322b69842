"""Full scores over keys and values that are gathered through the block table: the readable reference.

Paging makes attention itself slower, not faster: every step first copies the context of every request together. What
it gains is room for more requests. m4 reads the blocks where they lie.
"""

import torch

from common.batch import RaggedBatch
from stages.m1_kv_cache.attention import full_attention
from stages.m3_paged_kv.kv_tensors import PagedKV


class GatherAttention:
    def __init__(self, kv: PagedKV) -> None:
        self.kv = kv
        self._block_size = kv.blocks.shape[3]

    def begin(self, batch: RaggedBatch) -> None:
        self._slot_mapping = batch.slot_mapping
        if batch.num_decodes == batch.num_seqs:
            self._groups = [self._group(batch, 0, batch.num_seqs, 1)]  # all decodes in one call
            return
        lengths: list[int] = batch.query_start_loc.diff().tolist()
        self._groups = [self._group(batch, i, i + 1, length) for i, length in enumerate(lengths)]

    def _group(self, batch: RaggedBatch, first: int, last: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For sequences first ... last - 1, of `length` query tokens each: their blocks [B, M], M enough for the
        longest, and what each query may not see [B, L, M * block_size]."""
        ends = batch.seq_lens[first:last]
        context = batch.max_seq_len if last - first > 1 else int(ends[0])
        blocks = batch.block_tables[first:last, : -(-context // self._block_size)]
        positions = ends[:, None] - length + torch.arange(length, device=ends.device)  # [B, L]
        slots = torch.arange(blocks.shape[1] * self._block_size, device=ends.device)
        return blocks, slots > positions[..., None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq, D]."""
        self.kv.store(layer, k, v, self._slot_mapping)
        out: list[torch.Tensor] = []
        begin = 0
        for blocks, masked in self._groups:
            keys, values = (self._gather(x, blocks) for x in self.kv.blocks[layer])
            rows, length = masked.shape[:2]
            queries = q[begin : begin + rows * length].unflatten(0, (rows, length))
            out.append(full_attention(queries, keys, values, masked).flatten(0, 1))
            begin += rows * length
        return torch.cat(out) if len(out) > 1 else out[0]

    @staticmethod
    def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[num_blocks, block_size, Hkv, D] through block tables [B, M] to [B, Hkv, M * block_size, D]."""
        gathered = cache.index_select(0, blocks.flatten())  # [B * M, block_size, Hkv, D]
        return gathered.view(blocks.shape[0], -1, *cache.shape[2:]).transpose(1, 2)

    def kv_bytes(self) -> int:
        return self.kv.nbytes()
