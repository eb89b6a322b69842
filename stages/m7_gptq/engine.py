"""m7: m6 with its linear layers in 4 bits and, on a GPU, its output head in 8."""

from common.config import EngineConfig
from common.engine import Engine
from stages.m4_flash_attention.wiring import wire
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from stages.m6_prefix_caching.engine import new_cache
from stages.m7_gptq.fast.choose import choose_fast
from stages.m7_gptq.load import load_quantized


def build(config: EngineConfig) -> Engine:
    return wire("m7", config, load_quantized(config, choose_fast(config)), new_cache(config), ChunkedScheduler)
