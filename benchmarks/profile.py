"""Where the time of some steps goes: linear layers, attention, norms and rotary, sampling, host, idle.

On a CPU the parts are ranges of one clock. On a GPU they are kernels: a first pass, without CUDA graphs, learns which
kernel belongs to which part; the pass that is measured runs as the engine runs, and its kernels are recognised by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function

import stages
from benchmarks.contestant import Setting
from benchmarks.environment import environment
from benchmarks.files import write_atomically, write_json
from benchmarks.measure import ATTENDS
from benchmarks.plots.picture import save_picture
from benchmarks.profile_parts import (
    ATTENTION,
    ELEMENTWISE,
    HOST,
    IDLE,
    LINEAR,
    SAMPLING,
    STEP,
    Event,
    learn_kernels,
    parts_on_cpu,
    parts_on_gpu,
)
from benchmarks.stage_contestant import StageContestant
from benchmarks.style import title
from benchmarks.worker import warm_up
from benchmarks.workloads import BenchRequest, find_size
from common import Engine, SamplingParams, runner
from common.config import parse_device, stage_options

COLORS = {
    LINEAR: "#332288",
    ATTENTION: "#117733",
    ELEMENTWISE: "#DDAA33",
    SAMPLING: "#CC6677",
    HOST: "#8C8C8C",
    IDLE: "#DDDDDD",
}
SKIPPED = 8
"""Steps before the profile begins: the first ones only prefill."""


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; its calls are a named range of the profile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def named(thing: Any, ranges: Mapping[str, str]) -> Any:
    """A copy of it whose methods of these names are ranges, also when they call one another."""
    methods = {method: ranged(name, getattr(type(thing), method)) for method, name in ranges.items()}
    twin = copy(thing)
    twin.__class__ = type(type(thing).__name__, (type(thing),), methods)
    return twin


OPS = {
    **dict.fromkeys(("norm_linear", "norm_swiglu", "residual_linear"), LINEAR),
    **dict.fromkeys(("norm", "swiglu", "qk_norm_rope"), ELEMENTWISE),
    "sample": SAMPLING,
}
"""A norm before a matrix product counts apart where it is a kernel of its own, and as linear where the two are one."""


@contextmanager
def named_parts(engine: Engine) -> Iterator[None]:
    """While it runs, the parts of a step show up in profiles under their names."""
    model, attention, sample = engine.runner.model, engine.runner.attention, runner.sample
    twin = named(model, {"__call__": ELEMENTWISE})
    twin.ops = named(model.ops, OPS)
    engine.runner.model = twin
    for name in ATTENDS:
        if (attend := getattr(attention, name, None)) is not None:
            vars(attention)[name] = ranged(ATTENTION, attend)
    runner.sample = ranged(SAMPLING, sample)
    try:
        yield
    finally:
        engine.runner.model, runner.sample = model, sample
        for name in ATTENDS:
            vars(attention).pop(name, None)


def run_steps(engine: Engine, requests: Sequence[BenchRequest], count: int, trace: Path) -> list[Event]:
    """The events of `count` steps in the middle of these requests, written to `trace` too, as Chrome's trace format;
    what is left of the requests is aborted."""
    ids = [engine.add_request(r.prompt, SamplingParams(max_tokens=r.max_tokens, ignore_eos=True)) for r in requests]
    for _ in range(SKIPPED):
        engine.step()
    activities = [ProfilerActivity.CPU]
    if engine.config.torch_device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            if engine.has_unfinished:
                with record_function(STEP):
                    engine.step()
        if engine.config.torch_device.type == "cuda":
            torch.cuda.synchronize()
    for id in ids:
        engine.abort(id)
    while engine.has_unfinished:
        engine.step()
    write_atomically(trace, lambda path: profiler.export_chrome_trace(str(path)))
    return json.loads(trace.read_text())["traceEvents"]


def profile(
    stage: str,
    workload: str,
    model: str,
    device: str,
    dtype: str,
    steps: int,
    quick: bool,
    options: dict[str, Any],
    folder: Path,
) -> list[Path]:
    """Profile some steps of a workload; print the table; returns the files written."""
    place = parse_device(device)
    name = stages.short_name(stage)
    trace, picture, numbers = (folder / f"{name}_profile.{ending}" for ending in ("chrome.json", "png", "json"))
    size = find_size(workload, None, "quick" if quick else "gpu" if place.type == "cuda" else "cpu")
    wanted = stage_options(stages.number(stage), {**size.options, **options})
    contestant = StageContestant(name, Setting.of(model, dtype, str(place), size, wanted))
    engine = contestant.engine
    try:
        requests = size.requests(contestant.vocab_size, run=1)
        warm_up(contestant, size, 4)
        known: dict[str, str] = {}
        if place.type == "cuda":
            graphs, engine.runner.graphs = engine.runner.graphs, None
            with named_parts(engine):
                known = learn_kernels(run_steps(engine, requests, steps, trace))
            engine.runner.graphs = graphs
        with named_parts(engine):
            events = run_steps(engine, requests, steps, trace)
        parts = parts_on_gpu(events, known) if place.type == "cuda" else parts_on_cpu(events)
    finally:
        contestant.close()
    heading = f"{title(name)}, {workload}, {steps} steps · {model} · {dtype} · {place}"
    times = {name: seconds / steps * 1e3 for name, seconds in parts.items()}
    Console().print(table(times, heading))
    save_picture(picture, lambda: bars(times, heading))
    rows = [{"where": name, "ms_per_step": ms} for name, ms in times.items()]
    write_json(numbers, {"schema": "profile-1", "environment": environment(), "profiled": heading, "records": rows})
    return [trace, picture, numbers]


def table(times: dict[str, float], heading: str) -> Table:
    """times: milliseconds a step."""
    whole = sum(times.values()) or 1.0
    result = Table(title=heading, title_justify="left", title_style="", box=None)
    for column in ("where", "ms a step", "share"):
        result.add_column(column, justify="left" if column == "where" else "right")
    for name, ms in times.items():
        result.add_row(name, f"{ms:.2f}", f"{ms / whole:.0%}")
    return result


def bars(times: dict[str, float], heading: str) -> Figure:
    """A bar for each part, with its time and share."""
    figure, axis = plt.subplots(figsize=(11, 4.2))
    whole = sum(times.values()) or 1.0
    for row, (name, ms) in enumerate(times.items()):
        axis.barh(row, ms, color=COLORS[name])
        axis.text(ms, row, f"  {ms:.2f} ms, {ms / whole:.0%}", va="center")
    axis.set_yticks(range(len(times)), list(times))
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("milliseconds a step")
    axis.set_title(heading, loc="left")
    return figure
