"""flash-attn needs a GPU. Here each version is a fake with the published signature that records the
call, checks what the library would check, and computes the full formula: so the backend's calls are held to both."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from stages.m4_flash_attention.fast.backends import Backend
from stages.m4_flash_attention.fast.backends.flash_attn import FlashAttnBackend
from tests.m4.cases import STEPS, full_formula, make_case

KV_CACHE_2 = (
    "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale "
    "causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
)
VARLEN_2 = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
    "alibi_slopes deterministic return_attn_probs block_table"
)
KV_CACHE_3 = (
    "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table "
    "cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal "
    "window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin "
    "return_softmax_lse"
)
"""Parameters of flash_attn_with_kvcache and flash_attn_varlen_func, flash-attn 2.8, and of version 3's."""


class Library:
    """Functions with given parameter names; `calls` holds what each was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def bind(self, names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names.split()])
        call = signature.bind(*args, **kwargs).arguments
        self.calls.append(call)
        for name in ("cache_seqlens", "block_table", "page_table", "cu_seqlens_q", "cu_seqlens_k"):
            if name in call:
                assert call[name].dtype == torch.int32, name
        assert call["causal"] is True
        return call

    def kv_cache_2(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = self.bind(KV_CACHE_2, args, kwargs)
        q = call["q"]
        assert q.dim() == 4
        assert call["k_cache"].shape[1] % 256 == 0
        starts = torch.arange(q.shape[0] + 1) * q.shape[1]
        keys, values, lengths, tables = (call[x] for x in ("k_cache", "v_cache", "cache_seqlens", "block_table"))
        return over_pages(q.flatten(0, 1), keys, values, starts, lengths, tables).view(q.shape)

    def varlen_2(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = self.bind(VARLEN_2, args, kwargs)
        starts, key_starts = call["cu_seqlens_q"], call["cu_seqlens_k"]
        assert call["k"].shape[1] % 256 == 0
        assert starts[0] == key_starts[0] == 0
        assert starts[-1] == call["q"].shape[0]
        assert call["max_seqlen_q"] >= starts.diff().max()
        assert call["max_seqlen_k"] >= key_starts.diff().max()
        return over_pages(call["q"], call["k"], call["v"], starts, key_starts.diff(), call["block_table"])

    def kv_cache_3(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = self.bind(KV_CACHE_3, args, kwargs)
        starts = call["cu_seqlens_q"]
        assert call["max_seqlen_q"] == starts.diff().max()
        keys, values, lengths, tables = (call[x] for x in ("k_cache", "v_cache", "cache_seqlens", "page_table"))
        return over_pages(call["q"], keys, values, starts, lengths, tables)


def over_pages(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor,
    tables: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Causal, aligned to the last key, as the libraries document it."""
    assert len(starts) == len(lengths) + 1 == len(tables) + 1
    parts: list[torch.Tensor] = []
    for begin, end, length, table in zip(starts[:-1], starts[1:], lengths, tables, strict=True):
        k, v = (x[table.long()].flatten(0, 1)[:length] for x in (keys, values))
        parts.append(full_formula(q[begin:end], k, v))
    return torch.cat(parts).to(q.dtype)


def build(name: str, library: Library) -> Backend:
    if name == "flash-attn 3":
        return FlashAttnBackend(3, library.kv_cache_3, library.varlen_2)
    return FlashAttnBackend(2, library.kv_cache_2, library.varlen_2)


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3"])
@pytest.mark.parametrize("step", STEPS)
def test_library_is_called_with_what_it_expects(name: str, step: str) -> None:
    library = Library()
    case = make_case(STEPS[step], block_size=16 if name == "flash-attn 3" else 256)
    case.check(build(name, library))
    decodes = case.batch.num_decodes
    separate = name == "flash-attn 2" and 0 < decodes < case.batch.num_seqs
    assert len(library.calls) == (2 if separate else 1)
