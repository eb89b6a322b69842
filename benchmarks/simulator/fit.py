"""The prices of a machine, from measured steps or from kept results, and how far predictions are from measurements."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Results
from benchmarks.contestant import Setting
from benchmarks.environment import environment
from benchmarks.files import read_json
from benchmarks.recipes import timed, warm
from benchmarks.record import Record, record_runs
from benchmarks.simulator.cost import WEIGHTS_OF, Cost, FittedCost, Work, fit, work
from benchmarks.simulator.replica import GPU, build
from benchmarks.stage_contestant import StageContestant, drive
from benchmarks.worker import WARMUP_TOKENS, warm_up
from benchmarks.workloads import Size, find_size, preset_of
from common.config import parse_device
from common.errors import UserError
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.models.sources.random_weights import PRESETS
from common.watch import clock
from common.watch.trace import StepTrace

SCHEMA = "cost-1"
FITTED_ON = ("decode_one", "decode_four", "decode_eight", "decode", "prefill", "long_context", "memory_pressure")
VALIDATED_ON = ("mixed", "arrivals", "interference", "shared_prefix")
TOLERANCE = {"output_tokens_per_s": 0.1, "ttft_s.p50": 0.1, "ttft_s.p99": 0.2, "itl_s.p50": 0.1, "itl_s.p99": 0.2}
BREAK = 0.002  # seconds between two steps; a longer pause is the engine without requests


def predict(stage: str, workload: str, size: Size, model: Any, cost: Cost, gpu: bool) -> Record:
    """The workload on a simulated engine, with the options that the harness gives a real one."""
    options: dict[str, Any] = {"max_num_seqs": size.max_num_seqs, **(GPU if gpu else {}), **size.options}
    options["kv_cache_memory"] = size.kv_budget_tokens * kv_bytes_per_token(model, Setting.of("", "bf16", "cpu", size, {}).dtype)
    virtual = clock.VirtualClock()
    with clock.using(virtual), build(stage, model, cost, virtual, options, size.max_model_len) as engine:
        requests = size.requests(model.vocab_size, run=1)
        if warm(requests):
            drive(engine, warm(requests), lambda tokens: None)
        return record_runs(stage, workload, timed(requests), [drive(engine, timed(requests), lambda tokens: None)])


def measure(stage: str, model: str, device: str, quick: bool) -> dict[str, Any]:
    """Run all workloads on this machine; fit the prices on some, predict the others."""
    preset = preset_of(str(parse_device(device)), quick)
    shape = open_source(model, parse_device(device)).config
    rows: list[Sequence[float]] = []
    seconds: list[float] = []
    for workload in FITTED_ON:
        _, trace = _run(stage, workload, model, device, preset)
        for one, took in _steps(trace):
            rows.append((1.0, *one))
            seconds.append(took)
    cost = fit(rows, seconds)
    compared: list[dict[str, Any]] = []
    for workload in VALIDATED_ON:
        record, _ = _run(stage, workload, model, device, preset)
        guess = predict(stage, workload, find_size(workload, None, preset), shape, cost, preset == "gpu")
        compared += compare(workload, record, guess)
    config = {"model": model, "dtype": "bf16", "device": device, "preset": preset}
    return {
        "schema": SCHEMA, "stage": stage, "environment": environment(), "config": config, "fitted_on": list(FITTED_ON),
        "steps": len(seconds), "seconds": dict(zip(WEIGHTS_OF, cost.coefficients, strict=True)), "validation": compared,
    }  # fmt: skip


def _run(stage: str, workload: str, model: str, device: str, preset: str) -> tuple[Record, StepTrace]:
    """Once, warm, with a trace."""
    size = find_size(workload, None, preset)
    contestant = StageContestant(stage, Setting.of(model, "bf16", device, size, {}))
    try:
        warm_up(contestant, size, WARMUP_TOKENS[preset])
        requests = size.requests(contestant.vocab_size, run=1)
        if warm(requests):
            contestant.run(warm(requests), lambda tokens: None)
        trace = contestant.engine.trace = StepTrace(max_steps=1_000_000)
        run = contestant.run(timed(requests), lambda tokens: None)
        return record_runs(stage, workload, timed(requests), [run]), trace
    finally:
        contestant.close()


def _steps(trace: StepTrace) -> Iterator[tuple[Work, float]]:
    """What each step computed, and seconds from the end of the one before, whose tokens were handed out meanwhile."""
    last = -1.0
    for step in trace.steps:
        end = step.begin + step.duration
        begin = last if 0 <= step.begin - last < BREAK else step.begin
        yield work(step.chunks), end - begin
        last = end


def compare(workload: str, measured: Record, predicted: Record) -> list[dict[str, Any]]:
    """For each figure: both values, how far off the prediction is, and whether that is within what is asked."""
    found: list[dict[str, Any]] = []
    for name, allowed in TOLERANCE.items():
        real, guess = _value(measured, name), _value(predicted, name)
        if real and guess is not None:
            error = guess / real - 1
            row = {"workload": workload, "stage": measured.stage, "figure": name, "measured": real, "predicted": guess}
            found.append({**row, "error": error, "allowed": allowed, "met": abs(error) <= allowed})
    return found


def _value(record: Record, name: str) -> float | None:
    field, _, part = name.partition(".")
    value = getattr(record, field)
    return value[part] if part and value else value


# -- from kept results: no trace of single steps, but totals --------------------------------------------------------------


def from_kept(folder: Path, stage: str = "m6") -> dict[str, Any]:
    """The prices of an H200 from the records in `folder`: runs in which all requests start together take the same steps
    whatever a step takes, so that their totals are equations; so are the first tokens of single prompts."""
    shape = PRESETS["qwen3-0.6b"]
    files = {name: Results.read(folder / f"{name}.json") for name in ("gpu-bench", "single", "long", "gpu-ladder", "shared_prefix", "interference")}
    rows: list[Sequence[float]] = []
    seconds: list[float] = []
    for name, workload in (("gpu-bench", "decode_one"), ("gpu-bench", "decode"), ("single", "single")):
        size, record = find_size(workload, None, "gpu"), _kept(files[name], stage, workload)
        for row, took in _equations(stage, size, record):
            rows.append(row)
            seconds.append(took)
    for record in files["long"].sweeps:
        if record.stage == "m4" and record.ok and record.ttft_s and record.variant:
            length = float(record.variant.split("=")[1])
            rows.append((1.0, *Work(prompts=1, prompt_tokens=length, pairs=length * (length + 1) / 2)))
            seconds.append(record.ttft_s["p50"])
    cost = fit(rows, seconds)
    compared: list[dict[str, Any]] = []
    for name, workload, by in (
        ("gpu-bench", "nano", stage), ("gpu-ladder", "mixed", stage), ("gpu-ladder", "mixed", "m4"),
        ("interference", "interference", "m5"), ("interference", "interference", "m4"),
        ("shared_prefix", "shared_prefix", stage),
    ):  # fmt: skip
        guess = predict(by, workload, find_size(workload, None, "gpu"), shape, cost, gpu=True)
        compared += compare(workload, _kept(files[name], by, workload), guess)
    origin, config = files["gpu-bench"], dict(files["gpu-bench"].config)
    return {
        "schema": SCHEMA, "stage": stage, "environment": origin.environment, "config": config,
        "fitted_on": ["decode_one", "decode", "single", "long_context (m4)"], "steps": len(seconds),
        "seconds": dict(zip(WEIGHTS_OF, cost.coefficients, strict=True)), "validation": compared,
    }  # fmt: skip


def _kept(results: Results, stage: str, workload: str) -> Record:
    for record in results.records:
        if (record.stage, record.workload) == (stage, workload) and record.ok and not record.plain:
            return record
    raise UserError(f"no kept result of {stage} on {workload}: run `make gpu-bench` and `make gpu-ladder` first")


def _equations(stage: str, size: Size, record: Record) -> Iterator[tuple[Sequence[float], float]]:
    """(steps, *Work) of a decode step in the middle of the run, and the median time between tokens."""
    requests = size.requests(vocab_size=1)
    context = sum(r.prompt_length + r.max_tokens / 2 for r in requests)
    if record.itl_s:
        yield (1.0, *Work(decodes=len(requests), context=context)), record.itl_s["mean"]


def read_cost(path: Path) -> tuple[FittedCost, dict[str, Any]]:
    values = read_json(path)
    return FittedCost(tuple(values["seconds"][name] for name in WEIGHTS_OF)), values
