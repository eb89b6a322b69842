"""What m4 to m7 wire alike: blocks in the budget, attention over them, and how the steps are executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from common.config import EngineConfig
from common.engine import Engine
from common.execution.cuda_graphs import capture_steps
from common.execution.step_inputs import StepBuilder
from common.kv_cache import PagedManager
from common.memory import blocks_in_budget
from common.models.load import Loaded
from common.runner import Runner
from common.scheduler import Scheduler
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
    graphs = config.captures and capturable
    kv = PagedKV(model, blocks + graphs, size, cpu_blocks)  # graphs' padding rows write into a spare block
    scheduler = new_scheduler(new_cache(blocks, size, cpu_blocks), config)
    attention, builder = new_attention(kv), StepBuilder(size)
    runner = Runner(model, attention, builder, kv.move)
    if graphs:
        runner.graphs = capture_steps(model, attention, builder, config, loaded.max_model_len, spare_block=blocks)
    return Engine(stage, config, scheduler, runner, loaded.tokenizer, loaded.max_model_len)
