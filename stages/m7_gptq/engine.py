"""m7: m6 with its linear layers in 4 bits and, on a GPU, its output head in 8."""

from __future__ import annotations

from common.batch import RaggedBuilder
from common.config import EngineConfig
from common.engine import Engine
from common.execution.cuda_graphs import capture_steps
from common.memory import blocks_in_budget
from common.runner import Runner
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.attention import FlashAttention
from stages.m4_flash_attention.select import choose_for
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from stages.m6_prefix_caching.hash_index import HashIndex
from stages.m6_prefix_caching.kv_cache import PagedCache
from stages.m6_prefix_caching.radix_index import RadixIndex
from stages.m7_gptq.fast.choose import choose_fast
from stages.m7_gptq.load import load_quantized

INDICES = {"hash": HashIndex, "radix": RadixIndex}


def build(config: EngineConfig) -> Engine:
    fast = choose_fast(config.torch_dtype, config.torch_device)
    loaded = load_quantized(config, fast, config.fused_kernels)
    model, size = loaded.model, config.block_size
    blocks, cpu_blocks = blocks_in_budget(config, model, loaded.max_model_len)
    choice = choose_for(config, model)
    graphs = config.captures and choice.capturable
    kv = PagedKV(model, blocks + graphs, size, cpu_blocks)  # padding rows of graphs write into a block that nobody owns
    cache = PagedCache(blocks, size, cpu_blocks, INDICES[config.prefix_index]())
    runner = Runner(model, FlashAttention(kv, choice), RaggedBuilder(size), kv.move)
    if graphs:
        capture_steps(runner, config, loaded.max_model_len, spare_block=blocks)
    return Engine("m7", config, ChunkedScheduler(cache, config), runner, loaded.tokenizer, loaded.max_model_len)
