"""Simulated engines: their time is the one worked out by hand, and their schedules are those of real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from benchmarks.recipes import BenchRequest
from benchmarks.simulator import cluster, fit, replica
from benchmarks.simulator.command import simulate
from benchmarks.simulator.cost import PRICES, Device, FittedCost, PaperCost, Work, received, work
from benchmarks.stage_contestant import drive
from common import Engine, UserError
from common.config import stage_options
from common.memory import kv_bytes_per_token
from common.models.sources.random_weights import PRESETS
from common.watch import clock
from common.watch.trace import StepTrace

MODEL = PRESETS["tiny-llama"]
PRICED = FittedCost((1.0, 0.5, 0.0, 0.0, 0.25, 0.0))  # a step 1 s, a decode 0.5 s, a prompt token 0.25 s
TINY: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "overlap": False}
REQUESTS = [BenchRequest(list(range(3 + 5 * i)), 3 + i, arrival=1.5 * i) for i in range(8)]


def ignore(_: int) -> None:
    """Nobody counts tokens."""


def simulated(stage: str, virtual: clock.VirtualClock, **options: Any) -> Engine:
    return replica.build(stage, MODEL, PRICED, virtual, TINY | options, 256)


@pytest.mark.parametrize("overlap", [False, True])
def test_virtual_time_is_the_time_worked_out_by_hand(overlap: bool) -> None:
    virtual = clock.VirtualClock()
    with clock.using(virtual), simulated("m6", virtual, overlap=overlap) as engine:
        run = drive(engine, [BenchRequest([1] * 8, 3), BenchRequest([2] * 4, 2)], ignore)
    # Both prompts: 1 + 12 * 0.25 = 4 s. Two decodes: 1 + 2 * 0.5 = 2 s. One: 1.5 s.
    assert [t.token_times for t in run.timelines] == [[4.0, 6.0, 7.5], [4.0, 6.0]]


def test_the_clock_is_the_machines_again_after_a_simulation() -> None:
    with clock.using(clock.VirtualClock(5.0)):
        assert clock.now() == 5.0
    assert clock.now() != 5.0


@pytest.mark.parametrize("stage", ["m2", "m3", "m4", "m5", "m6"])
def test_a_simulated_engine_plans_what_the_real_one_plans(stage: str, build: Callable[..., Engine]) -> None:
    """All at once, in little memory: whatever a step takes, its plan is the same, preemption included."""
    requests = [BenchRequest(r.prompt, 40) for r in REQUESTS]
    memory = 160 * kv_bytes_per_token(MODEL, torch.bfloat16)
    options: dict[str, Any] = {**TINY, "kv_cache_memory": memory}
    plans: list[list[Any]] = []
    virtual = clock.VirtualClock()
    with clock.using(virtual):
        engine = replica.build(stage, MODEL, PRICED, virtual, options, 80)
        plans.append(_plans(engine, requests))
    own = stage_options(stages.number(stage), options)
    plans.append(_plans(build(stage, model="random:tiny-llama", dtype="bf16", max_model_len=80, **own), requests))
    assert plans[0] == plans[1]
    assert len(plans[0]) > 40


def _plans(engine: Engine, requests: list[BenchRequest]) -> list[Any]:
    trace = engine.trace = StepTrace()
    drive(engine, requests, ignore)
    return [([(c.request_id, c.kind, c.start, c.length) for c in s.chunks], s.preempted) for s in trace.steps]


def test_static_batches_are_refused() -> None:
    with pytest.raises(UserError, match="m2 to m7"):
        simulated("m1", clock.VirtualClock())


def test_fitting_finds_the_prices_that_made_the_times() -> None:
    true = FittedCost((1e-3, 1e-4, 1e-7, 0.0, 2e-5, 1e-9))
    works = [work([(0, n), (3 * n, 1), (n, 1)]) for n in range(2, 40)] + [work([(n * n, 1)] * n) for n in range(1, 9)]
    found = fit.fit([(1.0, *one) for one in works], [true(one) for one in works])
    assert found(Work(5, 900, 0, 70, 3000)) == pytest.approx(true(Work(5, 900, 0, 70, 3000)), rel=1e-3)
    assert min(found.prices) >= 0


def test_work_counts_pairs_of_tokens() -> None:
    assert work([(7, 1), (4, 3)]) == Work(1, 8, 1, 3, 5 + 6 + 7)
    assert received([(0, 10), (7, 1)]) == Work(2, 18)


def test_ranks_divide_the_reading_and_add_collectives() -> None:
    device = Device(1e12, 1e15, layer_seconds=0.0, link_bytes_per_s=1e12, collective_seconds=1e-6)
    one, two = PaperCost(MODEL, device), PaperCost(MODEL, device, ranks=2)
    assert one(Work(1)) == pytest.approx(one.weight_bytes / 1e12)
    assert two(Work(1)) == pytest.approx(one(Work(1)) / 2 + two.collectives(1))
    assert two.collectives(1) == pytest.approx(2 * MODEL.num_layers * (1e-6 + 2 * MODEL.hidden_size / 1e12))


@pytest.mark.parametrize("policy", cluster.ROUTERS)
def test_every_policy_serves_all_requests(policy: str) -> None:
    virtual = clock.VirtualClock()
    engines = [simulated("m6", virtual) for _ in range(3)]
    outcome = cluster.run(engines, virtual, iter(REQUESTS), cluster.ROUTERS[policy]())
    assert [len(t.token_times) for t in outcome.timelines] == [r.max_tokens for r in REQUESTS]
    assert all(t.ttft > 0 and min(t.itl) > 0 for t in outcome.timelines)


def test_a_cluster_of_one_is_an_engine() -> None:
    virtual, other = clock.VirtualClock(), clock.VirtualClock()
    outcome = cluster.run([simulated("m6", virtual)], virtual, iter(REQUESTS[:1]), cluster.round_robin())
    with clock.using(other), simulated("m6", other) as engine:
        assert drive(engine, REQUESTS[:1], ignore).timelines == outcome.timelines


def test_prefix_aware_routing_returns_to_what_is_cached_unless_it_is_busy() -> None:
    route = cluster.prefix_aware()
    prompt = list(range(200))
    first = route(prompt, [0] * 8)
    assert all(route([*prompt, n], [1] * 8) == first for n in range(5))
    busy = [50 if replica == first else 0 for replica in range(8)]
    assert any(route(prompt, busy) != first for _ in range(9))


def test_the_command_fits_and_answers(tmp_path: Path) -> None:
    simulate(model="random:tiny-llama", fit_prices=True, quick=True, out_dir=tmp_path)
    found = json.loads((tmp_path / "cost_model.json").read_text())
    assert list(found["prices"]) == list(PRICES)
    assert {row["workload"] for row in found["rows"]} == set(fit.VALIDATED_ON)
    simulate(quick=True, out_dir=tmp_path)
    assert len(list(tmp_path.glob("simulate-*.png"))) == len(list(tmp_path.glob("simulate-*.json"))) == 5


def test_fit_gives_prices_after_the_first_workload() -> None:
    """A run that is cut short must keep what it measured."""
    measuring = fit.measure("m6", "random:tiny-qwen3", "cpu", quick=True)
    first = dict(next(measuring))
    assert first["fitted_on"] == ["decode_one"] and not first["rows"]
    assert first["prices"]["step"] > 0 and first["equations"] > 0
    measuring.close()
