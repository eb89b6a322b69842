"""m5: m4 with a scheduler that computes prompts in chunks, together with decodes."""

from common.config import EngineConfig
from common.engine import Engine
from common.models import load_for
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m4_flash_attention.wiring import wire
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler


def build(config: EngineConfig) -> Engine:
    return wire("m5", config, load_for(config, config.fused_kernels), PagedCache, ChunkedScheduler)
