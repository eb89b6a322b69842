"""What is recorded of every step: counters always, and a trace where one is set."""

from collections import deque
from dataclasses import dataclass

from common.plan import StepPlan
from common.scheduler import Scheduler
from common.watch import clock
from common.watch.kv_memory import KVUsage
from common.watch.metrics import EngineMetrics
from common.watch.stopwatch import DeviceTime
from common.watch.trace import StepRecord, StepTrace


@dataclass(slots=True)
class PlannedStep:
    """The state when a step was planned: when it is collected, the next one may be planned already.
    plan_time, host_time: seconds that planning it took, and planning and starting it together, without recording it."""

    usage: KVUsage
    num_running: int
    plan_time: float
    host_time: float = 0.0
    record: StepRecord | None = None


class StepWatch:
    """Follows an engine's steps: `planned`, `started` and `collected` for each, in this order."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.metrics = EngineMetrics()
        self.trace: StepTrace | None = None
        self._scheduler = scheduler
        self._steps: deque[PlannedStep] = deque()
        self._last_end = 0.0  # when a step was collected last

    def planned(self, plan: StepPlan) -> None:
        usage, num_running = self._scheduler.cache.usage(), len(self._scheduler.running)
        planned = clock.now()
        step = PlannedStep(usage, num_running, planned - plan.planned_at)
        self._steps.append(step)
        if self.trace is not None:
            step.record = self.trace.open(plan, self._scheduler)
        step.host_time = planned - clock.now()

    def started(self, plan: StepPlan) -> None:
        self._steps[-1].host_time += clock.now() - plan.planned_at

    def collected(self, plan: StepPlan, device_time: DeviceTime | None) -> None:
        step = self._steps.popleft()
        begin, self._last_end = max(plan.planned_at, self._last_end), clock.now()
        self.metrics.plan_time_s += step.plan_time
        self.metrics.host_time_s += step.host_time
        self.metrics.record_step(plan, step.usage, step.num_running, self._last_end - begin)
        if self.trace is not None and step.record is not None:
            step.record.host_time = step.host_time
            self.trace.close(step.record, begin, self._last_end, device_time)

    def forget(self) -> None:
        """The steps that were planned are not collected."""
        self._steps.clear()
