"""m7: m6 with its linear layers in 4 bits and, on a GPU, its output head in 8."""

from __future__ import annotations

from common.config import EngineConfig
from common.engine import Engine
from stages.m4_flash_attention.wiring import wire
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from stages.m6_prefix_caching.engine import new_cache
from stages.m7_gptq.model import load_quantized, note_of


def build(config: EngineConfig) -> Engine:
    loaded = load_quantized(config, config.fused_kernels)
    engine = wire("m7", config, loaded, new_cache(config), ChunkedScheduler)
    engine.note = note_of(loaded.model, config)
    return engine
