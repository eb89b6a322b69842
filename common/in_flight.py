"""A step between its submission and its collection."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.kv_cache import KVUsage
from common.plan import StepPlan
from common.scheduler import Queues, Scheduler
from common.watch.trace import StepRecord


@dataclass(slots=True)
class StepInFlight:
    """The plan, and how things stood when it was made: when the step is collected, the next one may be planned already.
    plan_time, host_time: seconds that planning it took, and planning and starting it together."""

    plan: StepPlan
    scheduler: Scheduler
    plan_time: float = 0.0
    host_time: float = 0.0
    record: StepRecord | None = None
    usage: KVUsage = field(init=False)
    queues: Queues = field(init=False)

    def __post_init__(self) -> None:
        self.usage, self.queues = self.scheduler.cache.usage(), self.scheduler.queues()
