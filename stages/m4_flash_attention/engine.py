"""m4: m3 with attention that reads the blocks in place and never writes the score matrix."""

from __future__ import annotations

from common.batch import RaggedBuilder
from common.config import EngineConfig
from common.engine import Engine
from common.memory import blocks_in_budget
from common.models import load_for
from common.runner import Runner
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m3_paged_kv.scheduler import PagedScheduler
from stages.m4_flash_attention.attention import FlashAttention
from stages.m4_flash_attention.select import choose_for


def build(config: EngineConfig) -> Engine:
    loaded = load_for(config, config.fused_kernels)
    model, size = loaded.model, config.block_size
    blocks, cpu_blocks = blocks_in_budget(config, model, loaded.max_model_len)
    kv = PagedKV(model, blocks, size, cpu_blocks)
    scheduler = PagedScheduler(PagedCache(blocks, size, cpu_blocks), config)
    runner = Runner(model, FlashAttention(kv, choose_for(config, model)), RaggedBuilder(size), kv.move)
    return Engine("m4", config, scheduler, runner, loaded.tokenizer, loaded.max_model_len)
