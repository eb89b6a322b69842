"""What one asks before renting a cluster, answered by simulated engines."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.recipes import BenchRequest
from benchmarks.record import Timeline, summarize
from benchmarks.simulator import cluster
from benchmarks.simulator.cluster import Outcome
from benchmarks.simulator.cost import Cost, Device, PaperCost, Work, received, work
from benchmarks.simulator.replica import GPU, Count, build
from common.config import parse_dtype
from common.engine import Engine
from common.memory import kv_bytes_per_token
from common.models.config import ModelConfig
from common.models.sources.random_weights import PRESETS
from common.watch.clock import VirtualClock

SCHEMA = "simulated-1"
Row = dict[str, Any]  # `case` names it
TTFT, ITL, SHARE = 1.0, 0.05, 0.9
"""The objective: seconds to the first token, mean seconds between tokens of a request, and how many of the requests
have to keep both."""
PROMPT, OUTPUT = (256, 2048), (64, 256)
FILLED = 0.9  # of the memory, by weights and KV cache
BASE = replace(PRESETS["qwen3-4b"], tie_word_embeddings=False)


def _shape(name: str, hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> ModelConfig:
    return replace(
        BASE, name=name, hidden_size=hidden, intermediate_size=inner, num_layers=layers, num_heads=heads,
        num_kv_heads=8, head_dim=128, vocab_size=vocabulary,
    )  # fmt: skip


SHAPES = {
    "4B": _shape("4B", 2560, 9728, 36, 32, 151936),
    "32B": _shape("32B", 5120, 25600, 64, 64, 151936),
    "70B": _shape("70B", 8192, 28672, 80, 64, 128256),
}
"""Of Qwen3-4B, Qwen3-32B and Llama 3 70B."""


@dataclass(frozen=True)
class Model:
    """A model on a device, as the simulated engines see it. kv_bytes: what is left for the KV cache."""

    stage: str
    config: ModelConfig
    cost: Cost
    kv_bytes: int

    def engines(self, count: int, clock: VirtualClock, how: Count = work, **options: Any) -> list[Engine]:
        given = {**GPU, "prefill_chunk_size": 512, "max_num_seqs": 128, "max_num_batched_tokens": 8192}
        given |= {"kv_cache_memory": self.kv_bytes, **options}
        return [build(self.stage, self.config, self.cost, clock, given, 8192, how) for _ in range(count)]


def within(timeline: Timeline) -> bool:
    gaps = timeline.itl
    return timeline.ttft <= TTFT and (not gaps or sum(gaps) / len(gaps) <= ITL)


def _figures(timelines: Sequence[Timeline], rate: float) -> Row:
    """goodput: requests a second that met the objective, of `rate` offered. (Arrivals are drawn: some more came, or
    fewer.)"""
    share = sum(map(within, timelines)) / len(timelines)
    ttft, itl = summarize([t.ttft for t in timelines]), summarize([gap for t in timelines for gap in t.itl])
    assert ttft and itl
    return {
        "goodput": share * rate, "share": share, "ttft_p50": ttft["p50"], "ttft_p99": ttft["p99"],
        "itl_p50": itl["p50"], "itl_p99": itl["p99"],
    }  # fmt: skip


def _serve(model: Model, count: int, rate: float, seconds: float, **options: Any) -> Row:
    clock = VirtualClock()
    traffic = cluster.traffic(rate, seconds, PROMPT, OUTPUT)
    outcome = cluster.run(model.engines(count, clock, **options), clock, traffic, cluster.two_choices())
    return _figures(outcome.timelines, rate)


CHUNKS, BATCHES, SAME_RATE = (128, 256, 512, 1024, 2048, 8192), (8, 32, 128), 4.0


def chunk_and_batch(model: Model, rates: Sequence[float], seconds: float) -> list[Row]:
    """One replica, by chunk size and by how many requests run at once: its best goodput at rising rates, up to the one
    at which it falls; all other figures at `SAME_RATE`."""
    rows: list[Row] = []
    for chunk in CHUNKS:
        for batch in BATCHES:
            options: dict[str, Any] = {"prefill_chunk_size": chunk, "max_num_seqs": batch}
            tried: list[Row] = []
            for rate in rates:
                tried.append(_serve(model, 1, rate, seconds, **options))
                if tried[-1]["goodput"] < max(row["goodput"] for row in tried):
                    break
            same = {"rate": SAME_RATE, **_serve(model, 1, SAME_RATE, seconds, **options)}
            case = {"case": f"{chunk} {batch}", "chunk": chunk, "batch": f"up to {batch} at once"}
            rows.append(case | same | {"goodput": max(row["goodput"] for row in tried)})
    return rows


def replicas(model: Model, rates: Sequence[float], seconds: float) -> list[Row]:
    """The fewest replicas that keep the objective at each rate."""
    rows, count = list[Row](), 1
    for rate in rates:
        while (figures := _serve(model, count, rate, seconds))["share"] < SHARE and count < 4 * rate:
            count += 1
        rows.append(
            {"case": f"{rate:g}", "rate": rate, "objective": f"{SHARE:.0%} keep both", "replicas": count, **figures}
        )
    return rows


def routing(model: Model, count: int, rate: float, seconds: float) -> list[Row]:
    """Each policy on the same requests, of which many share long beginnings. Also what simulating it took: seconds on
    this machine, and of them for each step, which is bookkeeping, as steps cost nothing here."""
    rows: list[Row] = []
    for name, policy in cluster.ROUTERS.items():
        clock, began = VirtualClock(), time.perf_counter()
        traffic = cluster.traffic(rate, seconds, (32, 256), OUTPUT, groups=8 * count, shared=4096)
        outcome = cluster.run(model.engines(count, clock), clock, traffic, policy())
        took = time.perf_counter() - began
        figures = {"case": name, "policy": name, "hit_rate": outcome.hit_rate, **_figures(outcome.timelines, rate)}
        rows.append({**figures, "took_s": took, "steps": outcome.steps, "us_per_step": 1e6 * took / outcome.steps})
    return rows


def apart(model: Model, devices: int, rates: Sequence[float], seconds: float, link: float = 50e9) -> list[Row]:
    """Prefill and decode on separate devices, in several ratios, against chunked prefill on all; same requests. Keys
    and values move at `link` bytes a second, and the decoding devices never share one link."""
    per_token = kv_bytes_per_token(model.config, parse_dtype("bf16")) / link
    rows: list[Row] = []
    for rate in rates:
        rows.append(
            {"case": f"{rate:g} 0", "rate": rate, "prefill": "chunked on all", **_serve(model, devices, rate, seconds)}
        )
        for prefill in (devices // 4, devices // 2):
            requests = list(cluster.traffic(rate, seconds, PROMPT, OUTPUT))
            firsts = _run(model, prefill, [replace(r, max_tokens=1) for r in requests], work)
            arrivals = [
                first.token_times[0] + per_token * len(r.prompt)
                for r, first in zip(requests, firsts.timelines, strict=True)
            ]
            order = sorted(range(len(requests)), key=arrivals.__getitem__)
            moved = [
                replace(requests[i], prompt=[*requests[i].prompt, 0], max_tokens=requests[i].max_tokens - 1,
                        arrival=arrivals[i])
                for i in order
            ]  # fmt: skip
            rest = _run(model, devices - prefill, moved, received)
            whole = [
                Timeline(firsts.timelines[i].arrival, firsts.timelines[i].token_times + later.token_times)
                for i, later in zip(order, rest.timelines, strict=True)
            ]
            rows.append(
                {
                    "case": f"{rate:g} {prefill}",
                    "rate": rate,
                    "prefill": f"{prefill} prefill, {devices - prefill} decode",
                    **_figures(whole, rate),
                }
            )
    return rows


def _run(model: Model, count: int, requests: Sequence[BenchRequest], count_work: Count) -> Outcome:
    clock = VirtualClock()
    engines = model.engines(count, clock, count_work, prefill_chunk_size=8192)
    return cluster.run(engines, clock, iter(requests), cluster.two_choices())


def ranks(device: Device) -> list[Row]:
    """Tensor parallelism on paper: no scheduler, one step of each kind, where the weights fit."""
    rows: list[Row] = []
    kinds = {f"decode {n}": Work(decodes=n, context=n * 2048) for n in (1, 64)} | {"prefill": work([(0, 2048)])}
    for name, shape in SHAPES.items():
        for kind, one in kinds.items():
            for count in (1, 2, 4, 8):
                cost = PaperCost(shape, device, count)
                if cost.weight_bytes < FILLED * count * device.memory_bytes:
                    share = cost.collectives(one.decodes + one.prompt_tokens) / cost(one)
                    rows.append(
                        {
                            "case": f"{name} {kind} {count}",
                            "what": f"{name}, {kind}",
                            "ranks": count,
                            "seconds": cost(one),
                            "collectives": share,
                        }
                    )
    return rows


def answers(stage: str, device: Device, quick: bool) -> Iterator[tuple[str, list[Row]]]:
    """All of them: a 32B model, on one device each, whose steps are priced on paper."""
    cost, seconds = PaperCost(SHAPES["32B"], device), 2.0 if quick else 20.0
    model = Model(stage, cost.shape, cost, int(FILLED * device.memory_bytes - cost.weight_bytes))
    rates = (4.0,) if quick else tuple(2.0 + step / 2 for step in range(24))
    wide: dict[str, Callable[[], list[Row]]] = {
        "ranks": partial(ranks, device),
        "chunk_and_batch": partial(chunk_and_batch, model, rates, seconds),
        "replicas": partial(replicas, model, (4.0,) if quick else (4.0, 8.0, 16.0, 32.0), seconds),
        "apart": partial(apart, model, 8, (8.0,) if quick else (8.0, 16.0, 24.0, 32.0), seconds),
        "routing": partial(routing, model, 2 if quick else 64, 4.0 if quick else 96.0, 2.0 if quick else 60.0),
    }
    yield from ((name, answer()) for name, answer in wide.items())
