"""What an engine did, step by step: for pictures, for Perfetto, and for the question "why was this token late?"."""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.kv_cache import KVCacheManager, Region
from common.plan import StepPlan
from common.request import RequestStatus

MAX_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """`kind`: prefill, decode, recompute or idle; tokens `start ... start + length - 1` of the request."""

    request_id: str
    kind: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. Times in seconds on `time.perf_counter()`'s clock; KV figures in token slots, while the step ran."""

    index: int
    begin: float
    duration: float
    chunks: tuple[ChunkRecord, ...]
    preempted: tuple[str, ...]
    swapped_out: tuple[str, ...]
    waiting: int
    running: int
    swapped: int
    kv_reserved: int
    kv_stored: int
    regions: tuple[Region, ...] | None


class StepTrace:
    """The last `max_steps` steps. `regions`: also who holds which part of the KV memory, which costs O(pool) a step."""

    def __init__(self, max_steps: int = MAX_STEPS, regions: bool = False) -> None:
        self.steps: deque[StepRecord] = deque(maxlen=max_steps)
        self.arrivals: dict[str, float] = {}  # of the requests in `steps`, by request id
        self.keep_regions = regions
        self._count = 0

    def record(
        self, plan: StepPlan, cache: KVCacheManager, queues: tuple[int, int, int], begin: float, end: float
    ) -> None:
        """`queues`: how many wait, run and are swapped out. Call it after the step ran and before `update()`."""
        if len(self.steps) == self.steps.maxlen:
            self._forget(self.steps[0])
        for chunk in plan.chunks:
            for request in (chunk.request, *chunk.forks):
                self.arrivals.setdefault(request.id, request.arrival_time)
        usage = cache.usage()
        self.steps.append(
            StepRecord(
                index=self._count,
                begin=begin,
                duration=end - begin,
                chunks=tuple(ChunkRecord(c.request.id, c.kind, c.start, c.length) for c in plan.chunks),
                preempted=tuple(request.id for request in plan.preempted),
                swapped_out=tuple(r.id for r in plan.preempted if r.status is RequestStatus.SWAPPED),
                waiting=queues[0],
                running=queues[1],
                swapped=queues[2],
                kv_reserved=usage.reserved,
                kv_stored=usage.stored,
                regions=tuple(cache.regions()) if self.keep_regions else None,
            )
        )
        self._count += 1

    def _forget(self, oldest: StepRecord) -> None:
        """Requests end: their arrival times need not outlive the steps that mention them."""
        if len(self.arrivals) > 4 * len(self.steps):
            recent = {chunk.request_id for step in self.steps if step is not oldest for chunk in step.chunks}
            self.arrivals = {id: time for id, time in self.arrivals.items() if id in recent}

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
                args = {"start": chunk.start, "length": chunk.length}
                events.append(_event(chunk.kind, rows[chunk.request_id], begin, duration, args))
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


def _thread_name(row: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
