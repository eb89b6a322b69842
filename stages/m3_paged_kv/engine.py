"""m3: m2's scheduling over a KV cache in blocks."""

from common.config import EngineConfig
from common.engine import Engine
from common.memory import blocks_in_budget
from common.models import load_for
from common.runner import Runner
from stages.m3_paged_kv.attention import GatherAttention
from stages.m3_paged_kv.batch import PagedBatches
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m3_paged_kv.scheduler import PagedScheduler


def build(config: EngineConfig) -> Engine:
    loaded = load_for(config)
    model, size = loaded.model, config.block_size
    blocks, cpu_blocks = blocks_in_budget(config, model, loaded.max_model_len)
    kv = PagedKV(model, blocks, size, cpu_blocks)
    scheduler = PagedScheduler(PagedCache(blocks, size, cpu_blocks), config)
    runner = Runner(model, GatherAttention(kv), PagedBatches(size), kv.move)
    return Engine("m3", config, scheduler, runner, loaded.tokenizer, loaded.max_model_len)
