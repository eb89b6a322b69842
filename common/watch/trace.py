"""What an engine did, step by step: for pictures, for Perfetto, and for the question "why was this token late?"."""

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from common.kv_cache import PrefixCache
from common.plan import StepPlan
from common.request import RequestStatus
from common.scheduler import Scheduler
from common.watch.kv_memory import Region
from common.watch.stopwatch import DeviceTime

MAX_STEPS = 10_000


@dataclass(slots=True)
class ChunkRecord:
    """`kind`: prefill, decode, recompute, idle, or fork (a sample that starts from a prompt computed in this step);
    tokens `start ... start + length - 1` of the request. `cached`: tokens that the prefix cache had when the request
    started, in its first chunk; 0 in all others. `arrival`: of the request."""

    request_id: str
    kind: str
    start: int
    length: int
    arrival: float
    cached: int = 0


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One step. Times in seconds on `time.perf_counter()`'s clock; KV figures in token slots, while the step ran.

    `begin`: when it was planned or, if that was ahead, the end of the step before. `duration`: from there until its
    tokens were there. host_time: of planning and preparing it. device_busy, device_idle: on the GPU's own clock, see
    `DeviceTime`; None on a CPU. evicted_blocks: cached blocks evicted since the step before.
    """

    index: int = 0
    begin: float = 0.0
    duration: float = 0.0
    host_time: float = 0.0
    device_busy: float | None = None
    device_idle: float | None = None
    chunks: tuple[ChunkRecord, ...]
    preempted: tuple[str, ...]
    swapped_out: tuple[str, ...]
    swapped_in: tuple[str, ...]
    waiting: int
    running: int
    swapped: int
    kv_reserved: int
    kv_stored: int
    regions: tuple[Region, ...] | None
    evicted_blocks: int = 0


class StepTrace:
    """The last `max_steps` steps. `regions`: also the owners of each part of the KV memory, at O(pool) a step."""

    def __init__(self, max_steps: int = MAX_STEPS, regions: bool = False) -> None:
        self.steps: deque[StepRecord] = deque(maxlen=max_steps)
        self.keep_regions = regions
        self.cost = 0.0  # seconds that recording took
        self._count = 0
        self._evictions = 0

    def open(self, plan: StepPlan, scheduler: Scheduler) -> StepRecord:
        """When a step has been planned: what it does, and the state of queues and cache."""
        started = time.perf_counter()
        chunks: list[ChunkRecord] = []
        for chunk in plan.chunks:
            kind, request = chunk.kind, chunk.request
            first = kind == "prefill" and chunk.start == request.num_cached_tokens
            cached = chunk.start if first else 0
            chunks.append(ChunkRecord(request.id, kind, chunk.start, chunk.length, request.arrival_time, cached))
            chunks += [ChunkRecord(fork.id, "fork", chunk.end, 0, fork.arrival_time) for fork in chunk.forks]
        cache, before = scheduler.cache, self._evictions
        usage = cache.usage()
        if isinstance(cache, PrefixCache):
            self._evictions = cache.prefix_stats().evictions
        record = StepRecord(
            chunks=tuple(chunks),
            preempted=tuple(request.id for request in plan.preempted),
            swapped_out=tuple(r.id for r in plan.preempted if r.status is RequestStatus.SWAPPED),
            swapped_in=tuple(request.id for request in plan.resumed),
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            swapped=len(scheduler.swapped),
            kv_reserved=usage.reserved,
            kv_stored=usage.stored,
            regions=tuple(cache.regions()) if self.keep_regions else None,
            evicted_blocks=max(0, self._evictions - before),  # `Engine.reset_metrics()` resets the count
        )
        self.cost += time.perf_counter() - started
        return record

    def close(self, record: StepRecord, begin: float, end: float, device: DeviceTime | None) -> None:
        """When the step is done: how long it took. Only now is it among the steps."""
        record.index, record.begin, record.duration = self._count, begin, end - begin
        if device is not None:
            record.device_busy, record.device_idle = device.busy, device.idle
        self.steps.append(record)
        self._count += 1

    @property
    def arrivals(self) -> dict[str, float]:
        """Of the requests in `steps`, by request id."""
        return {chunk.request_id: chunk.arrival for step in self.steps for chunk in step.chunks}

    @property
    def idle_share(self) -> float | None:
        """Share of the GPU's time between the first step and the last in which no step ran; None on a CPU."""
        timed = [(step.device_busy, step.device_idle or 0.0) for step in self.steps if step.device_busy is not None]
        if not timed:
            return None
        busy, idle = sum(busy for busy, _ in timed), sum(idle for _, idle in timed[1:])
        return idle / (busy + idle)

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "arrivals": self.arrivals, "steps": [asdict(step) for step in self.steps]}

    def to_chrome(self) -> dict[str, Any]:
        """The Trace Event Format, which Perfetto and chrome://tracing open: a row for the steps, one a request."""
        rows = {id: row for row, id in enumerate(self.arrivals, start=1)}
        events = [_event("M", "thread_name", row, args={"name": id}) for id, row in {"steps": 0, **rows}.items()]
        for step in self.steps:
            begin, duration = step.begin * 1e6, step.duration * 1e6
            kinds = "+".join(sorted({chunk.kind for chunk in step.chunks}))
            args = {"step": step.index, "running": step.running}
            events.append(_event("X", kinds, 0, ts=begin, dur=duration, args=args))
            for chunk in step.chunks:
                args = {"start": chunk.start, "length": chunk.length, "cached": chunk.cached}
                events.append(_event("X", chunk.kind, rows[chunk.request_id], ts=begin, dur=duration, args=args))
            moved = {"preempted": step.preempted, "swapped out": step.swapped_out, "swapped in": step.swapped_in}
            for name, ids in moved.items():
                events += [_event("i", name, rows[id], s="t", ts=begin) for id in ids if id in rows]
            counters = {"waiting": step.waiting, "running": step.running, "swapped": step.swapped}
            events.append(_event("C", "requests", 0, ts=begin, args=counters))
            slots = {"stored": step.kv_stored, "reserved, empty": step.kv_reserved - step.kv_stored}
            events.append(_event("C", "KV token slots", 0, ts=begin, args=slots))
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(phase: str, name: str, row: int, **rest: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": 1, "tid": row, **rest}
