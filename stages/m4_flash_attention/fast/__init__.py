"""The same attention, fast: backends over the blocks in place, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable

from common.attention import Attention
from common.config import EngineConfig
from common.models import Decoder
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.attention import FlashAttention
from stages.m4_flash_attention.fast.attention import BackendAttention
from stages.m4_flash_attention.fast.select import choose_for


def choose_attention(config: EngineConfig, model: Decoder) -> tuple[Callable[[PagedKV], Attention], bool]:
    """What `attention_backend` asks for, and whether a CUDA graph can repeat it. `naive` is the definition."""
    if config.attention_backend == "naive":
        return FlashAttention, False
    choice = choose_for(config, model)
    return lambda kv: BackendAttention(kv, choice), choice.capturable
