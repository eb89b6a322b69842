"""PyTorch's own flash kernels: K and V are gathered through the block tables, and `scaled_dot_product_attention` does
the rest: decodes as one batch with a mask, prefill chunks one sequence at a time.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from common.batch import RaggedBatch
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend

AUTO = {"cuda": 2, "cpu": 1}
WHY = "runs everywhere"
CAPTURABLE = False


def why_not(shape: AttentionShape) -> str | None:
    return None


class GatherBackend(Backend):
    """Gather, then SDPA."""

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = step = batch
        decodes = step.num_decodes
        self._chunks = step.sequences(decodes) if decodes < step.num_seqs else []
        self._decode_mask = None
        if decodes:
            lengths = step.seq_lens[:decodes, None, None, None]
            positions = torch.arange(step.max_seq_len, device=lengths.device)
            # A padded row of length 0 looks at its first slot: a result that is not read, but a number.
            self._decode_mask = positions < lengths.clamp(min=1)  # [B, 1, 1, max_seq_len]

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        decodes, block_size = self._batch.num_decodes, kv.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            blocks = self._batch.block_tables[:decodes, : -(-self._batch.max_seq_len // block_size)]
            k, v = (x[blocks].flatten(1, 2)[:, : self._batch.max_seq_len].transpose(1, 2) for x in kv)  # [B, Hkv, S, D]
            rows = q[:decodes, :, None]  # [B, Hq, 1, D]
            out[:decodes] = _sdpa(rows, k, v, attn_mask=self._decode_mask)[:, :, 0]
        for table, (start, end, length) in zip(self._batch.block_tables[decodes:], self._chunks, strict=True):
            blocks = table[: -(-length // block_size)]
            k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for x in kv)  # [1, Hkv, length, D]
            rows = q[start:end].transpose(0, 1)[None]
            if end - start == length:
                result = _sdpa(rows, k, v, is_causal=True)
            else:  # is_causal aligns the mask to the first key; a later chunk's belongs to the last
                positions = torch.arange(length, device=q.device)
                mask = positions <= positions[length - (end - start) :, None]
                result = _sdpa(rows, k, v, attn_mask=mask)
            out[start:end] = result[0].transpose(0, 1)
        return out


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


create = GatherBackend
