"""m4: m3 with attention that reads the blocks in place and never writes the score matrix."""

from common.config import EngineConfig
from common.engine import Engine
from common.models import load_for
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.scheduler import PagedScheduler
from stages.m4_flash_attention.wiring import wire


def build(config: EngineConfig) -> Engine:
    return wire("m4", config, load_for(config, config.fused_kernels), PagedCache, PagedScheduler)
