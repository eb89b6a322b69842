"""The flash-attn library: version 3 (`flash_attn_interface`) or version 2 (`flash_attn`), whichever is installed.

Both read the cache in place through block tables. Version 2 wants pages of a multiple of 256 tokens.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from common.batch import RaggedBatch
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend

AUTO = {"cuda": 1}  # not measured
WHY = "reads the blocks in place"
CAPTURABLE = True

FLASH_ATTN_2_PAGE = 256


def installed_version() -> int | None:
    """3, 2 or None; imports nothing."""
    if importlib.util.find_spec("flash_attn_interface"):
        return 3
    return 2 if importlib.util.find_spec("flash_attn") else None


def why_not(shape: AttentionShape) -> str | None:
    if shape.device.type != "cuda":
        return f"it needs a GPU, and the device is {shape.device}"
    version = installed_version()
    if version is None:
        return "the library is not installed (pip install flash-attn)"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"it knows bfloat16 and float16 only, not {str(shape.dtype).removeprefix('torch.')}"
    if version == 2 and shape.block_size % FLASH_ATTN_2_PAGE:
        return f"flash-attn 2 wants block_size={FLASH_ATTN_2_PAGE}, not {shape.block_size}"
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"it knows head dimensions up to 256, in steps of 8, not {shape.head_dim}"
    return None


class FlashAttnBackend(Backend):
    """`with_kvcache` and `varlen` are the library's functions; their signatures differ between the versions."""

    def __init__(
        self, version: int, with_kvcache: Callable[..., torch.Tensor], varlen: Callable[..., torch.Tensor]
    ) -> None:
        self._version, self._with_kvcache, self._varlen = version, with_kvcache, varlen

    def begin(self, batch: RaggedBatch) -> None:
        self._batch = step = batch
        # Version 2 wants where each sequence's keys *would* begin if they lay end to end; it reads the lengths off it.
        self._key_starts = torch.nn.functional.pad(step.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._chunk_key_starts = self._key_starts[step.num_decodes :] - self._key_starts[step.num_decodes]

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        step = self._batch
        if self._version == 3:  # one call serves decodes and chunks alike
            return self._with_kvcache(
                q, kv[0], kv[1], cache_seqlens=step.seq_lens, page_table=step.block_tables,
                cu_seqlens_q=step.query_start_loc, max_seqlen_q=step.max_query_len, causal=True,
            )  # fmt: skip
        decodes = step.num_decodes
        parts: list[torch.Tensor] = []
        if decodes:
            rows = q[:decodes, None]  # [B, 1, Hq, D]
            lengths, tables = step.seq_lens[:decodes], step.block_tables[:decodes]
            out = self._with_kvcache(rows, kv[0], kv[1], cache_seqlens=lengths, block_table=tables, causal=True)
            parts.append(out[:, 0])
        if decodes < step.num_seqs:
            starts = step.query_start_loc[decodes:] - decodes  # the decodes before have one token each
            out = self._varlen(
                q[decodes:], kv[0], kv[1], starts, self._chunk_key_starts, step.max_query_len, step.max_seq_len,
                causal=True, block_table=step.block_tables[decodes:],
            )  # fmt: skip
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def create(shape: AttentionShape) -> FlashAttnBackend:
    version = installed_version()
    module = importlib.import_module("flash_attn_interface" if version == 3 else "flash_attn")
    return FlashAttnBackend(3 if version == 3 else 2, module.flash_attn_with_kvcache, module.flash_attn_varlen_func)
