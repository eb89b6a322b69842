"""The prices of a machine, and how far predictions with them are from measurements that they were not fitted on."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from benchmarks.contestant import Setting
from benchmarks.environment import environment
from benchmarks.recipes import timed, warm
from benchmarks.record import Record, record_runs
from benchmarks.simulator.cost import PRICES, Cost, FittedCost, fit, work
from benchmarks.simulator.replica import GPU, build
from benchmarks.stage_contestant import StageContestant, drive
from benchmarks.worker import WARMUP_TOKENS, warm_up
from benchmarks.workloads import Size, find_size, preset_of
from common.config import parse_device, parse_dtype
from common.memory import kv_bytes_per_token
from common.models.config import ModelConfig
from common.models.load import open_source
from common.watch import clock
from common.watch.progress import progress_bar
from common.watch.trace import StepTrace

SCHEMA = "cost-1"
FITTED_ON = ("decode_one", "decode_four", "decode_eight", "decode", "prefill", "long_context", "memory_pressure")
ON_A_GPU = ("decode_one", "decode_eight", "decode", "prefill", "long_context")  # each engine captures its graphs first
VALIDATED_ON = ("mixed", "arrivals", "interference", "shared_prefix")
ALLOWED = {"throughput": 0.1, "ttft p50": 0.1, "ttft p99": 0.2, "itl p50": 0.1, "itl p99": 0.2}
PAUSE = 0.002  # seconds between two steps from which on the engine had nothing to do

Row = tuple[Sequence[float], float]  # (steps, *Work), and its seconds


def predict(stage: str, workload: str, size: Size, model: ModelConfig, cost: Cost, gpu: bool) -> Record:
    """The workload on a simulated engine, with the options that the harness gives a real one."""
    memory = size.kv_budget_tokens * kv_bytes_per_token(model, parse_dtype("bf16"))
    options: dict[str, Any] = {"max_num_seqs": size.max_num_seqs, "kv_cache_memory": memory, **(GPU if gpu else {})}
    virtual = clock.VirtualClock()
    with (
        clock.using(virtual),
        build(stage, model, cost, virtual, options | dict(size.options), size.max_model_len) as e,
    ):
        requests = size.requests(model.vocab_size, run=1)
        if warm(requests):
            drive(e, warm(requests), lambda tokens: None)
        return record_runs(stage, workload, timed(requests), [drive(e, timed(requests), lambda tokens: None)])


def measure(stage: str, model: str, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Run all workloads on this machine, each once, with a trace; fit the prices on some, predict the others.

    What is known so far comes after each workload and each prediction: a run that is cut short keeps its prices."""
    place = parse_device(device)
    preset, shape = preset_of(str(place), quick), open_source(model, place).config
    rows: list[Row] = []
    real: dict[str, Record] = {}
    fitted_on = ON_A_GPU if preset == "gpu" else FITTED_ON
    workloads = [w for pair in zip_longest(fitted_on, VALIDATED_ON) for w in pair if w]  # a drift meets both alike
    config = {"model": model, "dtype": "bf16", "device": str(place), "preset": preset}
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": stage,
        "environment": environment(),
        "config": config,
        "rows": [],
    }
    found["fitted_on"] = list[str]()
    cost = FittedCost(())
    with progress_bar("measuring", len(workloads)) as advance:
        for workload in workloads:
            record, trace = _run(stage, workload, model, str(place), preset)
            if workload in fitted_on:
                rows += _steps(trace)
                cost = fit([row for row, _ in rows], [seconds for _, seconds in rows])
                found["fitted_on"].append(workload)
                yield found | {"equations": len(rows), "prices": dict(zip(PRICES, cost.prices, strict=True))}
            else:
                real[workload] = record
            advance(1)
    found |= {"equations": len(rows), "prices": dict(zip(PRICES, cost.prices, strict=True))}
    for workload, record in real.items():
        guess = predict(stage, workload, find_size(workload, None, preset), shape, cost, preset == "gpu")
        found["rows"] += compare(workload, record, guess)
        yield found


def _run(stage: str, workload: str, model: str, device: str, preset: str) -> tuple[Record, StepTrace]:
    size = find_size(workload, None, preset)
    contestant = StageContestant(stage, Setting.of(model, "bf16", device, size, {}))
    try:
        warm_up(contestant, size, WARMUP_TOKENS[preset])
        requests = size.requests(contestant.vocab_size, run=1)
        if warm(requests):
            contestant.run(warm(requests), lambda tokens: None)
        trace = contestant.engine.trace = StepTrace(max_steps=1 << 20)
        run = contestant.run(timed(requests), lambda tokens: None)
        return record_runs(stage, workload, timed(requests), [run]), trace
    finally:
        contestant.close()


def _steps(trace: StepTrace) -> Iterator[Row]:
    """What each step computed, and seconds from the end of the one before, whose tokens were handed out meanwhile."""
    last = float("-inf")
    for step in trace.steps:
        end = step.begin + step.duration
        begin = last if step.begin - last < PAUSE else step.begin
        yield (1.0, *work((chunk.start, chunk.length) for chunk in step.chunks)), end - begin
        last = end


def compare(workload: str, measured: Record, predicted: Record) -> list[dict[str, Any]]:
    """For each figure: both values, how far off the prediction is, and whether that is within what is allowed."""
    found: list[dict[str, Any]] = []
    for name, allowed in ALLOWED.items():
        real, guess = _figure(measured, name), _figure(predicted, name)
        if real and guess:
            row = {"workload": workload, "stage": measured.stage, "figure": name, "measured": real, "predicted": guess}
            error = guess / real - 1
            found.append({**row, "error": error, "allowed": allowed, "met": abs(error) <= allowed})
    return found


def _figure(record: Record, name: str) -> float | None:
    what, _, part = name.partition(" ")
    summary = {"ttft": record.ttft_s, "itl": record.itl_s}.get(what)
    return summary[part] if summary else record.output_tokens_per_s if what == "throughput" else None
