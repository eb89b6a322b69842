"""What m4 to m7 wire alike: blocks in the budget, attention over them, and how the steps are executed."""

from collections.abc import Callable
from typing import TypeVar

from common.config import EngineConfig
from common.engine import Engine
from common.execution.choose_runner import choose_runner
from common.kv_cache import PagedManager
from common.memory import blocks_in_budget
from common.models.load import Loaded
from common.scheduler import Scheduler
from stages.m3_paged_kv.batch import PagedBatches
from stages.m3_paged_kv.kv_tensors import PagedKV
from stages.m4_flash_attention.fast import choose_attention

Cache = TypeVar("Cache", bound=PagedManager)


def wire(
    stage: str,
    config: EngineConfig,
    loaded: Loaded,
    new_cache: Callable[[int, int, int], Cache],
    new_scheduler: Callable[[Cache, EngineConfig], Scheduler],
) -> Engine:
    """new_cache: called with the number of blocks, their size in tokens, and the number of blocks on the CPU."""
    model, size = loaded.model, config.block_size
    blocks, cpu_blocks = blocks_in_budget(config, model, loaded.max_model_len)
    new_attention, capturable = choose_attention(config, model)
    spare = 1 if config.captures and capturable else 0  # where CUDA graphs (execution) write padding
    kv = PagedKV(model, blocks + spare, size, cpu_blocks)
    scheduler = new_scheduler(new_cache(blocks, size, cpu_blocks), config)
    parts = new_attention(kv), PagedBatches(size), kv.move
    runner = choose_runner(config, model, *parts, loaded.max_model_len, blocks if spare else None)
    return Engine(stage, config, scheduler, runner, loaded.tokenizer, loaded.max_model_len)
