"""What one asks before renting a cluster, answered by simulated engines."""

import time
from collections.abc import Callable, Sequence
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
from common.memory import kv_bytes_per_token
from common.models.config import ModelConfig
from common.models.sources.random_weights import PRESETS
from common.watch.clock import VirtualClock

Row = dict[str, Any]
TTFT, ITL, SHARE = 1.0, 0.05, 0.9
"""The objective: seconds to the first token, mean seconds between tokens of a request, and how many of the requests
have to keep both."""
PROMPT, OUTPUT = (256, 2048), (64, 256)
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

    config: ModelConfig
    cost: Cost
    kv_bytes: int

    def engines(
        self, count: int, clock: VirtualClock, count_work: Count = work, stage: str = "m6", **options: Any
    ) -> Any:
        given = {**GPU, "max_num_seqs": 64, "max_num_batched_tokens": 8192, "kv_cache_memory": self.kv_bytes, **options}
        return [build(stage, self.config, self.cost, clock, given, 8192, count_work) for _ in range(count)]


def on_paper(name: str, device: Device, ranks: int = 1) -> Model:
    cost = PaperCost(SHAPES[name], device, ranks)
    room = int(0.9 * device.memory_bytes * ranks - cost.weight_bytes)
    return Model(SHAPES[name], cost, max(room, 0))


def within(timeline: Timeline) -> bool:
    gaps = timeline.itl
    return timeline.ttft <= TTFT and (not gaps or sum(gaps) / len(gaps) <= ITL)


def _figures(timelines: Sequence[Timeline], seconds: float) -> Row:
    """goodput: requests a second that met the objective."""
    good = sum(map(within, timelines))
    ttft, itl = summarize([t.ttft for t in timelines]), summarize([gap for t in timelines for gap in t.itl])
    assert ttft and itl
    return {
        "goodput": good / seconds, "share": good / len(timelines), "ttft_p50": ttft["p50"], "ttft_p99": ttft["p99"],
        "itl_p50": itl["p50"], "itl_p99": itl["p99"],
    }  # fmt: skip


def _serve(model: Model, count: int, rate: float, seconds: float, policy: str = "two choices", **options: Any) -> Row:
    clock = VirtualClock()
    traffic = cluster.traffic(rate, seconds, PROMPT, OUTPUT)
    outcome = cluster.run(model.engines(count, clock, **options), clock, traffic, cluster.ROUTERS[policy]())
    return _figures(outcome.timelines, seconds)


def chunk_and_batch(model: Model, rates: Sequence[float], seconds: float) -> list[Row]:
    """The best goodput of one replica at any of the rates, by chunk size and by how many requests run at once."""
    rows: list[Row] = []
    for chunk in (128, 256, 512, 1024, 2048, 8192):
        for batch in (8, 32, 128):
            options = {"prefill_chunk_size": chunk, "max_num_seqs": batch}
            tried = [{"rate": rate, **_serve(model, 1, rate, seconds, **options)} for rate in rates]
            rows.append({"chunk": chunk, "batch": batch, **max(tried, key=lambda row: row["goodput"])})
    return rows


def replicas(model: Model, rates: Sequence[float], seconds: float) -> list[Row]:
    """The fewest replicas that keep the objective at each rate."""
    rows, count = list[Row](), 1
    for rate in rates:
        while (figures := _serve(model, count, rate, seconds))["share"] < SHARE:
            count += 1 + count // 8
        rows.append({"rate": rate, "replicas": count, **figures})
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
        figures = {"policy": name, "hit_rate": outcome.hit_rate, **_figures(outcome.timelines, seconds)}
        rows.append({**figures, "took_s": took, "steps": outcome.steps, "us_per_step": 1e6 * took / outcome.steps})
    return rows


def apart(model: Model, devices: int, rates: Sequence[float], seconds: float, link: float = 50e9) -> list[Row]:
    """Prefill and decode on separate devices, in several ratios, against chunked prefill on all; same requests. Keys
    and values move at `link` bytes a second, and the decoding devices never share one link."""
    per_token = kv_bytes_per_token(model.config, parse_dtype("bf16")) / link
    rows: list[Row] = []
    for rate in rates:
        rows.append({"rate": rate, "prefill": 0, **_serve(model, devices, rate, seconds)})
        for prefill in (devices // 4, devices // 2):
            requests = list(cluster.traffic(rate, seconds, PROMPT, OUTPUT))
            firsts = _run(model, prefill, [replace(r, max_tokens=1) for r in requests], work)
            moved = list(cluster.handed_over(requests, firsts.timelines, per_token))
            order = sorted(range(len(moved)), key=lambda i: moved[i].arrival)
            rest = _run(model, devices - prefill, [moved[i] for i in order], received)
            whole = [
                Timeline(firsts.timelines[i].arrival, firsts.timelines[i].token_times + later.token_times)
                for i, later in zip(order, rest.timelines, strict=True)
            ]
            rows.append({"rate": rate, "prefill": prefill, **_figures(whole, seconds)})
    return rows


def _run(model: Model, count: int, requests: Sequence[BenchRequest], count_work: Count) -> Outcome:
    clock = VirtualClock()
    engines = model.engines(count, clock, count_work)
    return cluster.run(engines, clock, iter(requests), cluster.two_choices())


def ranks(device: Device) -> list[Row]:
    """Tensor parallelism on paper: no scheduler, one step of each kind."""
    rows: list[Row] = []
    context = 2048
    for name in SHAPES:
        for count in (1, 2, 4, 8):
            cost = PaperCost(SHAPES[name], device, count)
            kinds = {f"decode {n}": Work(decodes=n, context=n * context) for n in (1, 32, 128)}
            for kind, one in (kinds | {"prefill": work([(0, context)])}).items():
                share = cost.collectives(one.decodes + one.prompt_tokens) / cost(one)
                fits = cost.weight_bytes < 0.9 * count * device.memory_bytes
                rows.append(
                    {
                        "model": name,
                        "ranks": count,
                        "step": kind,
                        "seconds": cost(one),
                        "collectives": share,
                        "fits": fits,
                    }
                )
    return rows


def answers(device: Device, quick: bool) -> dict[str, list[Row]]:
    """All of them: a 32B model, on one device each, whose steps are priced on paper."""
    model, seconds = on_paper("32B", device), 2.0 if quick else 30.0
    rates = (2.0, 4.0) if quick else (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    wide: dict[str, Callable[[], list[Row]]] = {
        "ranks": partial(ranks, device),
        "chunk_and_batch": partial(chunk_and_batch, model, rates, seconds),
        "replicas": partial(replicas, model, (2.0, 4.0) if quick else (4.0, 8.0, 16.0, 32.0, 64.0), seconds),
        "apart": partial(apart, model, 8, (8.0,) if quick else (8.0, 16.0, 24.0, 32.0, 40.0), seconds),
        "routing": partial(routing, model, 2 if quick else 64, 4.0 if quick else 192.0, 2.0 if quick else 60.0),
    }
    return {name: answer() for name, answer in wide.items()}
