"""What an engine did, step by step: for pictures, for Perfetto, and for the question "why was this token late?"."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.kv_cache import KVCacheManager, PrefixCache, Region
from common.plan import StepPlan
from common.request import RequestStatus
from common.scheduler import Queues
from common.watch.stopwatch import DeviceTime

MAX_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """`kind`: prefill, decode, recompute, idle, or fork (a sample that starts from a prompt computed in this step);
    tokens `start ... start + length - 1` of the request. `cached`: tokens that the prefix cache had when the request
    started, in its first chunk; 0 in all others."""

    request_id: str
    kind: str
    start: int
    length: int
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
    copied_blocks: int
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
        self.arrivals: dict[str, float] = {}  # of the requests in `steps`, by request id
        self._last_seen: dict[str, int] = {}  # the newest step that mentions each of them
        self.keep_regions = regions
        self.cost = 0.0  # seconds that recording took
        self._count = 0
        self._evictions = 0

    def open(self, plan: StepPlan, cache: KVCacheManager, queues: Queues) -> StepRecord:
        """When a step has been planned: what it does, and the state of queues and cache."""
        started = time.perf_counter()
        chunks: list[ChunkRecord] = []
        for chunk in plan.chunks:
            kind = chunk.kind
            first = kind == "prefill" and chunk.start == chunk.request.num_cached_tokens
            cached = chunk.start if first else 0
            chunks.append(ChunkRecord(chunk.request.id, kind, chunk.start, chunk.length, cached))
            chunks += [ChunkRecord(request.id, "fork", chunk.end, 0) for request in chunk.forks]
        usage = cache.usage()
        record = StepRecord(
            chunks=tuple(chunks),
            preempted=tuple(request.id for request in plan.preempted),
            swapped_out=tuple(r.id for r in plan.preempted if r.status is RequestStatus.SWAPPED),
            swapped_in=tuple(request.id for request in plan.resumed),
            copied_blocks=len(plan.copies),
            waiting=queues.waiting,
            running=queues.running,
            swapped=queues.swapped,
            kv_reserved=usage.reserved,
            kv_stored=usage.stored,
            regions=tuple(cache.regions()) if self.keep_regions else None,
            evicted_blocks=self._evicted_since(cache),
        )
        self.cost += time.perf_counter() - started
        return record

    def close(self, record: StepRecord, plan: StepPlan, begin: float, end: float, device: DeviceTime | None) -> None:
        """When the step is done: how long it took. Only now is it among the steps."""
        started = time.perf_counter()
        if len(self.steps) == self.steps.maxlen:
            self._forget(self.steps[0])
        record.index, record.begin, record.duration = self._count, begin, end - begin
        if device is not None:
            record.device_busy, record.device_idle = device.busy, device.idle
        for chunk in plan.chunks:
            for request in (chunk.request, *chunk.forks):
                self.arrivals.setdefault(request.id, request.arrival_time)
                self._last_seen[request.id] = self._count
        self.steps.append(record)
        self._count += 1
        self.cost += time.perf_counter() - started

    @property
    def idle_share(self) -> float | None:
        """Share of the GPU's time between the first step and the last in which no step ran; None on a CPU."""
        timed = [(step.device_busy, step.device_idle or 0.0) for step in self.steps if step.device_busy is not None]
        if not timed:
            return None
        busy, idle = sum(busy for busy, _ in timed), sum(idle for _, idle in timed[1:])
        return idle / (busy + idle)

    def _evicted_since(self, cache: KVCacheManager) -> int:
        """Since the step recorded last. (`Engine.reset_metrics()` resets the count.)"""
        if not isinstance(cache, PrefixCache):
            return 0
        before, self._evictions = self._evictions, cache.prefix_stats().evictions
        return max(0, self._evictions - before)

    def _forget(self, oldest: StepRecord) -> None:
        """A request's arrival time is kept as long as a step that mentions it."""
        for chunk in oldest.chunks:
            if self._last_seen.get(chunk.request_id) == oldest.index:
                del self.arrivals[chunk.request_id], self._last_seen[chunk.request_id]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "arrivals": self.arrivals, "steps": [asdict(step) for step in self.steps]}

    def to_chrome(self) -> dict[str, Any]:
        """The Trace Event Format (complete events and counters), which Perfetto and chrome://tracing open: one row for
        the steps, one for each request."""
        rows = {id: row for row, id in enumerate(self.arrivals, start=1)}
        events: list[dict[str, Any]] = [_thread_name(0, "steps")]
        events += [_thread_name(row, id) for id, row in rows.items()]
        for step in self.steps:
            begin, duration = step.begin * 1e6, step.duration * 1e6
            kinds = "+".join(sorted({chunk.kind for chunk in step.chunks}))
            events.append(_event(kinds, 0, begin, duration, {"step": step.index, "running": step.running}))
            for chunk in step.chunks:
                args = {"start": chunk.start, "length": chunk.length, "cached": chunk.cached}
                events.append(_event(chunk.kind, rows[chunk.request_id], begin, duration, args))
            for name, ids in (
                ("preempted", step.preempted),
                ("swapped out", step.swapped_out),
                ("swapped in", step.swapped_in),
            ):
                events += [_instant(name, rows[id], begin) for id in ids if id in rows]
            counters = {"waiting": step.waiting, "running": step.running, "swapped": step.swapped}
            events.append({"name": "requests", "ph": "C", "pid": 1, "ts": begin, "args": counters})
            slots = {"stored": step.kv_stored, "reserved, empty": step.kv_reserved - step.kv_stored}
            events.append({"name": "KV token slots", "ph": "C", "pid": 1, "ts": begin, "args": slots})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write(self, path: Path, chrome: bool = False) -> None:
        """Write the whole file or nothing."""
        text = json.dumps(self.to_chrome() if chrome else self.to_json())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        os.replace(partial, path)


def _event(name: str, row: int, begin: float, duration: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 1, "tid": row, "ts": begin, "dur": duration, "args": args}


def _instant(name: str, row: int, at: float) -> dict[str, Any]:
    return {"name": name, "ph": "i", "s": "t", "pid": 1, "tid": row, "ts": at}


def _thread_name(row: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
