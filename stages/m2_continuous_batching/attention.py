"""Full scores again, for a ragged batch: whole prompts one by one, decodes all slots in one call."""

import torch

from common.batch import RaggedBatch
from common.memory import allocate_kv
from common.models import Decoder
from stages.m1_kv_cache.attention import full_attention


class SlotAttention:
    """K and V of all layers in one tensor [layers, 2, slots, Hkv, slot_length, D], allocated once."""

    def __init__(self, model: Decoder, num_slots: int, slot_length: int) -> None:
        c = model.config
        shape = (c.num_layers, 2, num_slots, c.num_kv_heads, slot_length, c.head_dim)
        self._kv = allocate_kv(shape, model.dtype, model.device)

    def begin(self, batch: RaggedBatch) -> None:
        self._slots = batch.block_tables[:, 0].long()  # [B]
        self._positions = batch.positions
        self._decoding = batch.num_decodes == batch.num_seqs
        if self._decoding:
            self._begin_decode(batch)
        else:
            self._begin_prefill(batch)

    def _begin_prefill(self, batch: RaggedBatch) -> None:
        lengths = batch.query_start_loc.diff()
        self._token_slots = self._slots.repeat_interleave(lengths)  # [T]
        self._lengths: list[int] = lengths.tolist()
        longest = torch.ones(batch.max_query_len, batch.max_query_len, dtype=torch.bool, device=lengths.device)
        self._future = longest.triu(diagonal=1)[None]  # [1, L, L]

    def _begin_decode(self, batch: RaggedBatch) -> None:
        self._token_slots = self._slots
        self._context = batch.max_seq_len
        self._in_use = int(self._slots.max()) + 1
        # 1: a softmax over nothing is NaN.
        slot_ends = torch.ones(self._in_use, dtype=torch.long, device=self._slots.device)
        slot_ends[self._slots] = batch.seq_lens.long()
        self._unwritten = (torch.arange(self._context, device=slot_ends.device) >= slot_ends[:, None])[:, None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq, D]."""
        keys, values = self._kv[layer]  # each [slots, Hkv, slot_length, D]
        keys[self._token_slots, :, self._positions] = k
        values[self._token_slots, :, self._positions] = v
        return self._decode(q, keys, values) if self._decoding else self._prefill(q, k, v)

    def _prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Each prompt against itself."""
        out: list[torch.Tensor] = []
        for prompt in zip(q.split(self._lengths), k.split(self._lengths), v.split(self._lengths), strict=True):
            q_one, k_one, v_one = (x[None] for x in prompt)  # [1, L, H, D]
            future = self._future[:, : q_one.shape[1], : q_one.shape[1]]
            out.append(full_attention(q_one, k_one.transpose(1, 2), v_one.transpose(1, 2), future)[0])
        return torch.cat(out)

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """All slots up to the last one in use, read where they lie: no copy of K and V, but free slots between them are
        computed too."""
        queries = q.new_zeros(self._in_use, *q.shape[1:])
        queries[self._slots] = q
        keys, values = keys[: self._in_use, :, : self._context], values[: self._in_use, :, : self._context]
        return full_attention(queries[:, None], keys, values, self._unwritten)[self._slots, 0]

    def kv_bytes(self) -> int:
        return self._kv.nbytes
