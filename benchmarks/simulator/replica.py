"""An engine whose steps are not computed but priced: the scheduler, the cache and the loop are a stage's own."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

import stages
from benchmarks.simulator.cost import Cost, Span, Work, work
from common.config import EngineConfig, stage_options
from common.engine import Engine
from common.errors import require
from common.memory import blocks_in_budget, kv_bytes_per_token, rows_in_budget
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.request import Request, SampledToken
from common.runner import Runner
from common.scheduler import Scheduler
from common.watch.clock import VirtualClock
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m2_continuous_batching.scheduler import ContinuousScheduler
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.scheduler import PagedScheduler
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from stages.m6_prefix_caching.engine import new_cache

Count = Callable[[Iterable[Span]], Work]
GPU = {"overlap": True, "prefill_chunk_size": 1024}
"""What a stage chooses by itself on a GPU, for an engine that has none."""


@dataclass(frozen=True)
class Shape:
    """What an engine asks of a model, without its weights."""

    config: ModelConfig
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    note: str | None = None


class NoAttention:
    description = "priced"

    def kv_bytes(self) -> int:
        return 0


class PricedRunner(Runner):
    """Steps that take what `cost` says, one after the other, on a device of their own. Tokens are made up."""

    def __init__(self, shape: Shape, cost: Cost, clock: VirtualClock, count: Count) -> None:
        self.model = cast("Decoder", shape)
        self.attention = cast("Any", NoAttention())
        self.graphs = None
        self.device_time = None
        self.prompt_scores = []
        self._cost, self._clock, self._count = cost, clock, count
        self._free = 0.0  # when the device has done all that was submitted
        self._steps: deque[tuple[float, list[Request]]] = deque()
        self._numbers = itertools.count()

    def submit(self, plan: StepPlan) -> None:
        self._free = max(self._free, self._clock.time) + self._cost(
            self._count((c.start, c.length) for c in plan.chunks)
        )
        self._steps.append((self._free, plan.drawing))

    def collect(self) -> dict[str, SampledToken]:
        end, requests = self._steps.popleft()
        self._clock.time = max(self._clock.time, end)
        vocabulary = self.model.config.vocab_size
        return {request.id: SampledToken(next(self._numbers) % vocabulary) for request in requests}

    def forget(self) -> None:
        self._steps.clear()


def simulated_number(stage: str) -> int:
    """The stage's number; `UserError` for one that the simulator has not."""
    number = stages.number(stage)
    require(number >= 2, f"the simulator runs m2 to m7, not {stage}: the padding of static batches has no price")
    return number


def build(
    stage: str, model: ModelConfig, cost: Cost, clock: VirtualClock, options: dict[str, Any], max_model_len: int,
    count: Count = work,
) -> Engine:  # fmt: skip
    """The engine of a stage from m2 on. `options` are those of `EngineConfig`; without `kv_cache_memory` there is room
    for max_num_seqs requests of max_model_len tokens."""
    number = simulated_number(stage)
    own: dict[str, Any] = {"device": "cpu", "dtype": "bf16", **stage_options(number, options)}
    shape = Shape(model)
    token_bytes = kv_bytes_per_token(model, shape.dtype)
    own.setdefault("kv_cache_memory", own.get("max_num_seqs", 16) * (max_model_len + 256) * token_bytes)
    config = EngineConfig(**own)
    scheduler = _scheduler(number, config, cast("Decoder", shape), max_model_len, token_bytes)
    return Engine(
        stages.short_name(stage), config, scheduler, PricedRunner(shape, cost, clock, count), None, max_model_len
    )


def _scheduler(number: int, config: EngineConfig, model: Decoder, length: int, token_bytes: int) -> Scheduler:
    """As the stage's `engine.py` wires it."""
    if number == 2:
        return ContinuousScheduler(SlotCache(rows_in_budget(config, model, length * token_bytes), length), config)
    blocks, cpu_blocks = blocks_in_budget(config, model, length)
    if number < 5:
        return PagedScheduler(PagedCache(blocks, config.block_size, cpu_blocks), config)
    cache = new_cache(config) if number >= 6 else PagedCache
    return ChunkedScheduler(cache(blocks, config.block_size, cpu_blocks), config)
