"""Counters of an engine, kept while it runs: what was computed, and how full the KV cache was."""

from dataclasses import dataclass

from common.attention import Attention
from common.kv_cache import PrefixCache
from common.plan import StepPlan
from common.request import RequestStatus
from common.scheduler import Scheduler
from common.watch.kv_memory import KVUsage

Metrics = dict[str, float | int | str | None]


@dataclass
class EngineMetrics:
    """Totals since the engine was built, or since `Engine.reset_metrics()`. Times are in seconds."""

    steps: int = 0
    busy_time_s: float = 0.0
    plan_time_s: float = 0.0  # of the host, deciding what a step does
    host_time_s: float = 0.0  # of the host, until a step was started: on a CPU it computes the step itself
    computed_tokens: int = 0
    padded_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    peak_running: int = 0
    preemptions: int = 0
    swaps: int = 0
    kv_peak_reserved: int = 0
    kv_peak_stored: int = 0
    kv_utilization_time: float = 0.0  # integral over time of stored / reserved
    kv_time: float = 0.0

    def record_step(self, plan: StepPlan, usage: KVUsage, num_running: int, duration: float) -> None:
        """`usage` and `num_running` as they were while the step ran."""
        self.steps += 1
        self.busy_time_s += duration
        self.computed_tokens += plan.num_tokens
        self.padded_tokens += plan.padded_tokens
        self.preemptions += len(plan.preempted)
        self.swaps += sum(request.status is RequestStatus.SWAPPED for request in plan.preempted)
        self.peak_running = max(self.peak_running, num_running)
        self.kv_peak_reserved = max(self.kv_peak_reserved, usage.reserved)
        self.kv_peak_stored = max(self.kv_peak_stored, usage.stored)
        if usage.reserved:
            self.kv_utilization_time += duration * usage.stored / usage.reserved
            self.kv_time += duration


def snapshot(
    stage: str, metrics: EngineMetrics, scheduler: Scheduler, attention: Attention, token_bytes: int
) -> Metrics:
    """What an engine does now, and what it has done since its counters began. token_bytes: K and V of one token.

    padding_share: of the computed positions, those that no request needed. kv_utilization: tokens stored over the slots
    that running requests held, averaged over the running time. Figures of a prefix cache are None without one."""
    m, cache, usage = metrics, scheduler.cache, scheduler.cache.usage()
    prefix = cache.prefix_stats() if isinstance(cache, PrefixCache) else None
    computed = m.computed_tokens + m.padded_tokens
    return {
        "stage": stage,
        "attention": getattr(attention, "description", None),  # what it chose, and why, where it has a choice
        "waiting": len(scheduler.waiting),
        "running": len(scheduler.running),
        "swapped": len(scheduler.swapped),
        **{name: value for name, value in vars(m).items() if not name.startswith("kv_")},
        "padding_share": m.padded_tokens / computed if computed else 0.0,
        "kv_blocks_used": usage.blocks,
        "kv_pool_bytes": attention.kv_bytes(),
        "kv_reserved_bytes": usage.reserved * token_bytes,
        "kv_used_bytes": usage.stored * token_bytes,
        "kv_reserved_peak_bytes": m.kv_peak_reserved * token_bytes,
        "kv_used_peak_bytes": m.kv_peak_stored * token_bytes,
        "kv_utilization": m.kv_utilization_time / m.kv_time if m.kv_time else None,
        "prefix_hit_rate": prefix and prefix.hit_rate,
        "tokens_saved": prefix and prefix.saved,
        "tokens_recovered": prefix and prefix.recovered,
        "blocks_shared": prefix and prefix.blocks,
        "blocks_shared_now": prefix and prefix.shared,
        "blocks_shared_peak": prefix and prefix.peak_shared,
        "blocks_cached": prefix and prefix.cached,
        "evictions": prefix and prefix.evictions,
    }
