"""m6: m5 with a KV cache that never computes the same beginning twice."""

from collections.abc import Callable

from common.config import EngineConfig
from common.engine import Engine
from common.models import load_for
from stages.m4_flash_attention.wiring import wire
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from stages.m6_prefix_caching.hash_index import HashIndex
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache
from stages.m6_prefix_caching.radix.radix_index import RadixIndex

INDICES = {"hash": HashIndex, "radix": RadixIndex}


def new_cache(config: EngineConfig) -> Callable[[int, int, int], PrefixPagedCache]:
    """Over the index that `prefix_index` asks for."""
    return lambda blocks, size, cpu_blocks: PrefixPagedCache(blocks, size, cpu_blocks, INDICES[config.prefix_index]())


def build(config: EngineConfig) -> Engine:
    return wire("m6", config, load_for(config, config.fused_kernels), new_cache(config), ChunkedScheduler)
