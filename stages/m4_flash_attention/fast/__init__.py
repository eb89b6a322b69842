"""The same attention, fast: backends over the blocks in place, and the choice among them."""

from collections.abc import Callable

from common.attention import Attention
from common.config import EngineConfig
from common.models import Decoder
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.attention import FlashAttention
from stages.m4_flash_attention.fast.attention import BackendAttention
from stages.m4_flash_attention.fast.backends import AttentionShape
from stages.m4_flash_attention.fast.select import choose


def choose_attention(config: EngineConfig, model: Decoder) -> tuple[Callable[[PagedKV], Attention], bool]:
    """What `attention_backend` asks for, and whether a CUDA graph can repeat it. `naive` is the definition."""
    if config.attention_backend == "naive":
        return FlashAttention, False
    c = model.config
    shape = AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, config.block_size, model.dtype, model.device)
    choice = choose(config.attention_backend, shape)
    return lambda kv: BackendAttention(kv, choice), choice.capturable
