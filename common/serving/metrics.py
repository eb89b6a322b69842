"""/metrics, in Prometheus' text format: what clients felt, and what the engine is doing."""

import re
from collections.abc import Iterator, Mapping, Sized
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.outputs import RequestOutput
from common.serving.engine_thread import Job

Snapshot = Mapping[str, float | int | str | None]  # what `Engine.metrics()` returns

PREFIX = "folovllm"
TOKEN_SECONDS, REQUEST_SECONDS = (
    tuple(float(f"{digits}e{exponent}") for exponent in decades for digits in (1, 1.5, 2, 3, 5, 7.5))
    for decades in (range(-4, 1), range(-3, 3))
)
"""0.1 ms to 7.5 s, and 1 ms to 750 s. Prometheus interpolates within a bucket, so a percentile can be wrong by the
ratio of its bounds: two thirds at most."""

GAUGES = {  # name here: (name in `Engine.metrics()`, or in `collect`; help); what an engine does not have is left out
    "requests_running": ("running", "Answers that hold KV memory and take part in steps."),
    "requests_waiting": ("waiting", "Answers that have not started, or were preempted."),
    "requests_swapped": ("swapped", "Answers whose KV blocks lie in CPU memory."),
    "kv_pool_bytes": ("kv_pool_bytes", "Bytes of KV memory."),
    "kv_reserved_bytes": ("kv_reserved_bytes", "Bytes of it that requests hold."),
    "kv_used_bytes": ("kv_used_bytes", "Bytes of it that store a token's keys and values."),
    "kv_usage_ratio": ("kv_usage", "Share of the KV memory that is held."),
    "prefix_hit_rate": ("prefix_hit_rate", "Share of prompt tokens found in the prefix cache."),
}
COUNTERS = {
    "steps": ("steps", "Steps of the engine."),
    "step_seconds": ("busy_time_s", "Seconds spent in steps."),
    "computed_tokens": ("computed_tokens", "Token positions computed for a request."),
    "generation_tokens": ("output_tokens", "Tokens generated."),
    "prefix_saved_tokens": ("tokens_saved", "Tokens of prompts found in the prefix cache."),
    "prefix_evictions": ("evictions", "Blocks that the prefix cache gave up for others."),
    "preemptions": ("preemptions", "Times that an answer lost its KV memory to another."),
    "swaps": ("swaps", "Preemptions that moved blocks to CPU memory."),
}


class ServerMetrics(Collector):
    """What clients felt is counted here; the engine's own counters are read from its last snapshot. A registry of its
    own, so that two servers can share a process."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._snapshot: Snapshot = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        own: dict[str, Any] = {"namespace": PREFIX, "registry": self._registry}
        long: dict[str, Any] = {"buckets": REQUEST_SECONDS, **own}
        short: dict[str, Any] = {"buckets": TOKEN_SECONDS, **own}
        self._ttft = Histogram("time_to_first_token_seconds", "Arrival to first token.", **long)
        self._tpot = Histogram("time_per_output_token_seconds", "Mean time between an answer's tokens.", **short)
        self._itl = Histogram("inter_token_latency_seconds", "Time between neighbouring tokens.", **short)
        self._queue = Histogram("queue_time_seconds", "Arrival to first scheduling.", **long)
        self._e2e = Histogram("request_seconds", "Arrival to end.", **long)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts whose answers have begun.", **own)
        self._requests = Counter("requests", "Prompts by how they ended: ok, abort, error.", ["outcome"], **own)
        for outcome in ("ok", "abort", "error"):
            self._requests.labels(outcome)  # from 0 on: `rate` does not see a series' first value
        ProcessCollector(registry=self._registry)  # its memory, time, and open files
        self._connections = Gauge("connections", "Open connections.", **own)
        self._finished = Counter("finished_tokens", "Tokens of answers that have ended.", ["reason"], **own)
        self._responses = Counter("http_responses", "HTTP responses.", ["path", "status"], **own)

    def watch(self, connections: Sized) -> None:
        self._connections.set_function(lambda: len(connections))

    def responded(self, path: str, status: int) -> None:
        """`path`: the route's, not the client's: labels must be few."""
        self._responses.labels(path, str(status)).inc()

    def gained(self, job: Job, output: RequestOutput) -> None:
        """A step has brought tokens to a job. Called in the engine's thread: an answer may take minutes to its end."""
        if output.finished and output.finish_reason == "length" and job.params.max_tokens == 0:
            self._prompt_tokens.inc(len(job.prompt))
        for sample in output.outputs:
            seen = job.timed_tokens[sample.index]
            times = sample.times_from(max(seen - 1, 0))
            if seen == sample.index == 0 and times:
                self._prompt_tokens.inc(len(job.prompt))
                self._ttft.observe(times[0] - output.arrival_time)
                if output.queue_time is not None:
                    self._queue.observe(output.queue_time)
            for earlier, later in pairwise(times):
                self._itl.observe(later - earlier)
            job.timed_tokens[sample.index] = max(seen - 1, 0) + len(times)

    def ended(self, output: RequestOutput | None, outcome: str) -> None:
        """A job is over; `output` is None if the engine never took it."""
        self._requests.labels(outcome).inc()
        if output is None:
            return
        for sample in output.outputs:
            self._finished.labels(sample.finish_reason or "abort").inc(len(sample.token_ids))
        for histogram, value in ((self._tpot, output.tpot), (self._e2e, output.e2e)):
            if value is not None:
                histogram.observe(value)

    def render(self, snapshot: Snapshot) -> bytes:
        """The page, with the engine's figures as they were between two steps."""
        self._snapshot = snapshot
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        info = GaugeMetricFamily(f"{PREFIX}_info", "Which engine this is.", labels=["stage"])
        info.add_metric([self._stage], 1)
        yield info
        figures = {name: value for name, value in self._snapshot.items() if isinstance(value, int | float)}
        if "kv_pool_bytes" in figures:
            pool = figures["kv_pool_bytes"]
            figures["kv_usage"] = min(1.0, figures["kv_reserved_bytes"] / pool) if pool else 0.0
        if "tokens_saved" in figures:
            figures.setdefault("prefix_hit_rate", 0.0)  # before the first prompt
        for kind, entries in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (source, text) in entries.items():
                if source in figures:
                    yield kind(f"{PREFIX}_{name}", text, value=figures[source])


def one_page(pages: Mapping[str, str]) -> str:
    """Prometheus' text format: the samples of all pages, with a label `replica`; each family is in one place."""
    families: dict[str, str] = {}
    for replica, page in pages.items():
        for head, samples in re.findall(r"(# HELP .*\n# TYPE .*\n)((?:[^#].*\n)*)", page):
            labelled = re.sub(r"^(\w+)(?:{(.*)})? ", rf'\1{{replica="{replica}",\2}} ', samples, flags=re.M)
            families[head] = families.get(head, "") + labelled
    return "".join(head + samples for head, samples in families.items())
