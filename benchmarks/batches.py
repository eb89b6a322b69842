"""Tokens a second against the batch, greedy and sampled: `python -m benchmarks batches`, a part of `make gpu-bench`.

For each stage one engine, so that its start is paid once. A batch is so many requests of 128 tokens in and 512 out (on
a CPU and in tests: fewer); `nano` is the workload. Every way of sampling takes its turn within each repeat.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import stages
from benchmarks import cli
from benchmarks.attention import ceilings
from benchmarks.environment import short_hardware
from benchmarks.files import read_json
from benchmarks.limits import tokens_per_s
from benchmarks.plots.batches import batches_figure
from benchmarks.plots.picture import save_picture
from benchmarks.recipes import BenchRequest
from benchmarks.sheet import print_table, write_sheet
from benchmarks.workloads import alike, find, preset_of
from common import Engine, SamplingParams
from common.config import parse_device, parse_dtype
from common.errors import UserError
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.watch.progress import progress_bar
from common.watch.trace import StepTrace

SCHEMA = "batches-1"
GREEDY = "greedy"
SAMPLINGS: dict[str, dict[str, float]] = {
    GREEDY: {"temperature": 0.0},
    "sampled": {"temperature": 0.6},
    "top_p": {"temperature": 0.7, "top_p": 0.95},
}
SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {  # the batches, and tokens in and out
    "gpu": ((1, 2, 4, 8, 16, 32, 64, 128, 256), 128, 512),
    "cpu": ((1, 4, 16), 32, 64),
    "quick": ((1, 3), 4, 4),
}
NANO = "nano"


def run(
    stages_: Annotated[str, typer.Option("--stages", help="Separated by commas.")] = "m6,m7",
    model: Annotated[str, typer.Option(help="A name, a folder, a hub id, or random:<preset>.")] = "random:qwen3-0.6b",
    device: cli.Device = "auto",
    dtype: cli.Dtype = "bf16",
    path: cli.JsonFile = None,
    quick: cli.Quick = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 3,
) -> dict[str, Any]:
    """Decode batches of 1 to 256 requests and `nano`, greedy and sampled; results as they come, resumable."""
    target = parse_device(device)
    place, _ = cli.places(path, None, "batches.json")
    config = {"model": model, "dtype": dtype, "device": str(target), "preset": preset_of(target.type, quick)}
    records = _resumed(place, config)
    write = partial(_write, place, config, target, quick, records)
    for stage in stages_.split(","):
        measure(stages.short_name(stage), config, target, repeats, records, write)
    results = write()
    show(results)
    hardware = short_hardware(results["environment"], target.type)
    picture = save_picture(place.with_name("batches.png"), lambda: batches_figure(results, hardware))
    print(f"wrote {place} and {picture}", file=sys.stderr)
    return results


def _resumed(path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an interrupted run."""
    if not path.exists():
        return []
    values = read_json(path)
    if values.get("schema") != SCHEMA or values["config"] != config:
        raise UserError(f"{path} holds results of other settings: move it away, or name another file with --json")
    return values["records"]


def _write(
    path: Path, config: dict[str, Any], device: torch.device, quick: bool, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Limits are those of the ceilings measured with the first records."""
    before = read_json(path) if path.exists() else {}
    if (limits := before.get("limits")) is None:
        kind, shape = parse_dtype(config["dtype"]), open_source(config["model"], device).config
        with torch.inference_mode():
            found = ceilings(device, kind, quick)
        work = {name: requests(name, config["preset"], shape.vocab_size, 1) for name in names(config["preset"])}
        limits = {name: tokens_per_s(asked, shape, kind, found) for name, asked in work.items()}
    for record in records:
        record["of_reading"] = record["output_tokens_per_s"] / limits[record["batch"]]
    return write_sheet(path, SCHEMA, config, records, limits=limits, samplings=SAMPLINGS)


def names(preset: str) -> list[str]:
    """The batches, then `nano`."""
    return [*map(str, SIZES[preset][0]), NANO]


def requests(name: str, preset: str, vocab_size: int, number: int) -> list[BenchRequest]:
    """Of run `number`."""
    _, prompt, output = SIZES[preset]
    size = find(NANO).sizes[preset] if name == NANO else alike(int(name), prompt, output, prompt + output)
    return size.requests(vocab_size, number)


def measure(
    stage: str, config: dict[str, Any], device: torch.device, repeats: int, records: list[dict[str, Any]], write: Any
) -> None:
    """Add what `records` has not yet of this stage, and call `write` after each batch."""
    done = {r["batch"] for r in records if r["stage"] == stage}
    if not (left := [name for name in names(config["preset"]) if name not in done]):
        return
    with build(stage, config, device) as engine, progress_bar(stage, len(left) * (repeats + 1)) as advance:
        for name in left:
            make = partial(requests, name, config["preset"], engine.runner.model.config.vocab_size)
            numbers = itertools.count()  # other prompts each time: none is found in a prefix cache
            for params in SAMPLINGS.values():  # the first time, and the clocks of a GPU that was idle
                time_of(engine, [BenchRequest(r.prompt, min(8, r.max_tokens)) for r in make(next(numbers))], params)
            speeds: dict[str, list[float]] = {way: [] for way in SAMPLINGS}
            for _ in range(repeats):
                for way, params in SAMPLINGS.items():
                    asked = make(next(numbers))
                    speeds[way].append(sum(r.max_tokens for r in asked) / time_of(engine, asked, params))
                advance(1)
            watched = watch(engine, make(next(numbers)))
            advance(1)
            for way, runs in speeds.items():
                what = {"stage": stage, "batch": name, "sampling": way}
                speed = {"output_tokens_per_s": statistics.median(runs), "output_tokens_per_s_repeats": runs}
                records.append(what | speed | (watched if way == GREEDY else {}))
            write()


def build(stage: str, config: dict[str, Any], device: torch.device) -> Engine:
    batches, prompt, output = SIZES[config["preset"]]
    nano, rows = find(NANO).sizes[config["preset"]], max(batches)
    rows, length = max(rows, nano.max_num_seqs), max(nano.max_model_len, prompt + output)
    token_bytes = kv_bytes_per_token(open_source(config["model"], device).config, parse_dtype(config["dtype"]))
    memory = max(nano.kv_budget_tokens, rows * (prompt + output)) * token_bytes
    options = {"max_num_seqs": rows, "max_model_len": length, "kv_cache_memory": memory}
    return stages.build(stage, model=config["model"], dtype=config["dtype"], device=device, **options)


def time_of(engine: Engine, asked: Sequence[BenchRequest], params: dict[str, float]) -> float:
    """Seconds from the first request to the last token."""
    every = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True, **params) for r in asked]
    began = time.perf_counter()
    engine.generate([r.prompt for r in asked], every, progress=None)
    return time.perf_counter() - began


def watch(engine: Engine, asked: Sequence[BenchRequest]) -> dict[str, float]:
    """One greedy run more, with a trace, which costs time of its own. Of its pure decode steps: how much of the time
    the GPU was busy, and what the host took for each row, in µs."""
    engine.trace = StepTrace(max_steps=1 << 20)
    time_of(engine, asked, SAMPLINGS[GREEDY])
    steps = [s for s in engine.trace.steps if all(c.kind == "decode" for c in s.chunks)]
    engine.trace = None
    busy, idle = (sum(getattr(s, f"device_{name}") or 0.0 for s in steps) for name in ("busy", "idle"))
    rows = sum(len(s.chunks) for s in steps)
    found = {"host_us_per_row": 1e6 * sum(s.host_time for s in steps) / max(1, rows)}
    return found | ({"gpu_busy": busy / (busy + idle)} if busy else {})


def show(results: dict[str, Any]) -> None:
    records = results["records"]
    rows: list[Sequence[str]] = []
    for stage in dict.fromkeys(r["stage"] for r in records):
        for name in names(results["config"]["preset"]):
            own = {r["sampling"]: r for r in records if (r["stage"], r["batch"]) == (stage, name)}
            if own:
                speeds = [own[way]["output_tokens_per_s"] for way in SAMPLINGS]
                first = own[GREEDY]
                busy = f"{first['gpu_busy']:.1%}" if "gpu_busy" in first else "–"
                shares = f"{first['of_reading']:.0%}", busy, f"{first['host_us_per_row']:.1f} µs"
                rows.append((stage, name, *(f"{speed:,.0f}" for speed in speeds), *shares))
    headings = "stage", "batch", *SAMPLINGS, "of reading", "GPU busy", "host a row"
    caption = (
        "output tokens/s, medians; of reading: greedy, over reading all weights and contexts at the rate of a copy"
    )
    print_table(f"batches, {results['config']['model']}", headings, rows, words=2, caption=caption)
