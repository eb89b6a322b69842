"""The record of one contestant (a stage or a peer) on one workload, and the figures that it is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np

from benchmarks.recipes import STEADY, BenchRequest

SCHEMA = 1
POSITION_BINS = 64

Summary = dict[str, float]  # mean, p50, p90, p99 and max, in seconds


@dataclass(frozen=True)
class Timeline:
    """What one request saw, in seconds on one clock: when it arrived, and when each of its tokens came."""

    arrival: float
    token_times: list[float]

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def itl(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def e2e(self) -> float:
        return self.token_times[-1] - self.arrival


@dataclass(frozen=True)
class Run:
    """One timed run of a workload. start: when the first request arrived. metrics: the contestant's own counters; those
    with the name of a `Record`'s field are recorded."""

    start: float
    timelines: list[Timeline]
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def duration(self) -> float:
        """First arrival to last token, in seconds."""
        return max(t.token_times[-1] for t in self.timelines) - self.start

    @property
    def output_tokens_per_s(self) -> float:
        return sum(len(t.token_times) for t in self.timelines) / self.duration


@dataclass
class Record:
    """One contestant on one workload. Times are in seconds, memory in bytes, shares in 0 ... 1; None: does not apply.

    `stage` is `m0` ... `m7` or a peer's name, `status` `ok` or `failed`. The figures are those of the median run, by
    output tokens per second; `output_tokens_per_s_repeats` has that figure of every run. kv_pool_bytes: all that was
    allocated. kv_reserved_bytes: peak of what running requests hold. kv_utilization: tokens stored over the token
    capacity of what running requests hold, averaged over the time in which anything runs. itl_by_position: for a
    workload of one request, [position in the sequence, seconds that its token took], at most 64 points.
    attention_time_s and peak_activation_bytes: of one more run of a probed workload (`benchmarks.worker.probe`).
    itl_s and tpot_s are those of the steady group, where a workload has one. ttft_by_group: for each group of requests.
    prefix_hit_rate: tokens that came from the prefix cache over all prompt tokens; tokens_saved: those tokens;
    blocks_shared: blocks taken from the prefix cache; evictions: blocks that it gave up for others. plain: the idea
    alone, in a comparison that also has the stage with execution.
    """

    stage: str
    workload: str
    status: str = "ok"
    repeats: int = 0
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    ttft_s: Summary | None = None
    tpot_s: Summary | None = None
    itl_s: Summary | None = None
    e2e_s: Summary | None = None
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    kv_pool_bytes: int | None = None
    kv_reserved_bytes: int | None = None
    kv_used_peak_bytes: int | None = None
    kv_utilization: float | None = None
    padding_share: float | None = None
    peak_running: int | None = None
    preemptions: int | None = None
    prefix_hit_rate: float | None = None
    tokens_saved: int | None = None
    gpu_utilization: float | None = None
    error: str | None = None
    note: str | None = None
    output_tokens_per_s_repeats: list[float] = field(default_factory=list[float])
    itl_by_position: list[list[float]] | None = None
    plain: bool = False
    attention_time_s: float | None = None
    peak_activation_bytes: int | None = None
    ttft_by_group: dict[str, Summary] | None = None
    blocks_shared: int | None = None
    evictions: int | None = None
    plan_time_s: float | None = None
    host_time_s: float | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.stage == "llama.cpp":  # of older files, which have one row of it: of the embedded model's own format
            self.stage = "llama.cpp Q4_1"

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def prompt_tokens_per_s(self) -> float:
        return (self.total_tokens_per_s or 0.0) - (self.output_tokens_per_s or 0.0)

    @property
    def attention_is_impossible(self) -> bool:
        """More time in attention than the longest request took. It is timed in a run of its own: where that one was
        slower than the timed ones, the two say nothing about each other."""
        return bool(self.e2e_s and (self.attention_time_s or 0.0) > self.e2e_s["max"])

    def to_json(self) -> dict[str, Any]:
        """The fields in order; only a sweep's point has a `variant`."""
        values = asdict(self)
        if self.variant is None:
            del values["variant"]
        return values

    @classmethod
    def failed(cls, stage: str, workload: str, error: str, **rest: Any) -> Self:
        return cls(stage, workload, status="failed", error=" ".join(error.split()), **rest)


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, percentiles (linear between neighbours) and maximum; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99, "max": float(max(values))}


def record_runs(stage: str, workload: str, requests: Sequence[BenchRequest], runs: Sequence[Run]) -> Record:
    """The record of a contestant that has run the workload, once or more."""
    by_speed = sorted(runs, key=lambda run: run.output_tokens_per_s)
    run = by_speed[(len(runs) - 1) // 2]  # the median; of an even number, the slower of the two in the middle
    steady = [t for t, r in zip(run.timelines, requests, strict=True) if r.group == STEADY]
    gaps = [t.itl for t in steady or run.timelines]
    prompt_tokens = sum(r.prompt_length for r in requests)
    output_tokens = sum(len(t.token_times) for t in run.timelines)
    names = {field.name for field in fields(Record)}
    values = {name: value for name, value in run.metrics.items() if name in names} | {"stage": stage}
    return Record(
        workload=workload,
        repeats=len(runs),
        output_tokens_per_s=run.output_tokens_per_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / run.duration,
        requests_per_s=len(requests) / run.duration,
        ttft_s=summarize([t.ttft for t in run.timelines]),
        tpot_s=summarize([sum(g) / len(g) for g in gaps if g]),
        itl_s=summarize([x for g in gaps for x in g]),
        e2e_s=summarize([t.e2e for t in run.timelines]),
        output_tokens_per_s_repeats=[r.output_tokens_per_s for r in runs],
        itl_by_position=itl_by_position(len(requests[0].prompt), gaps[0]) if len(requests) == 1 else None,
        ttft_by_group=ttft_by_group(requests, run),
        **values,
    )


def ttft_by_group(requests: Sequence[BenchRequest], run: Run) -> dict[str, Summary] | None:
    """In the order in which the groups appear; None where there are none."""
    groups: dict[str, list[float]] = {}
    for request, timeline in zip(requests, run.timelines, strict=True):
        if request.group:
            groups.setdefault(request.group, []).append(timeline.ttft)
    return {group: found for group, values in groups.items() if (found := summarize(values))} or None


def itl_by_position(prompt_length: int, gaps: Sequence[float]) -> list[list[float]]:
    """Median time of a token against its position in the sequence, in at most 64 bins of neighbouring positions."""
    positions = np.arange(len(gaps)) + prompt_length + 1  # the first gap ends with the second token
    bins = np.array_split(np.arange(len(gaps)), min(POSITION_BINS, len(gaps))) if gaps else []
    return [[float(np.mean(positions[b])), float(np.median(np.asarray(gaps)[b]))] for b in bins]
