"""Where the time of some steps goes: linear layers, attention, norms and rotary, sampling, host, idle.

On a CPU the parts are ranges of one clock. On a GPU they are kernels: a first pass, without CUDA graphs, learns which
kernel belongs to which part; the pass that is measured runs as the engine runs, and its kernels are told by name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function

import stages
from benchmarks.contestant import Setting
from benchmarks.files import write_atomically
from benchmarks.stage_contestant import StageContestant
from benchmarks.style import RC, title
from benchmarks.worker import warmup_requests
from benchmarks.workloads import BenchRequest, find_size
from common import Engine, SamplingParams, runner
from common.config import parse_device, stage_options

LINEAR, ATTENTION, ELEMENTWISE, SAMPLING = "linear layers", "attention", "norms and rotary", "sampling"
HOST, IDLE = "host", "idle"
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


class Ranged:
    """A callable whose calls are a named range of the profile; everything else is its own."""

    def __init__(self, name: str, callee: Any) -> None:
        self._name, self._callee = name, callee

    def __call__(self, *args: Any) -> Any:
        with record_function(self._name):
            return self._callee(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callee, name)


@contextmanager
def named_parts(engine: Engine) -> Iterator[None]:
    """While it runs, the parts of a step show up in profiles under their names."""
    model, attention, sample = engine.runner.model, engine.runner.attention, runner.sample
    projections = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    plain = [(layer, name, getattr(layer, name)) for layer in model.layers for name in projections]
    plain.append((model, "head", model.head))
    for owner, name, projection in plain:
        setattr(owner, name, Ranged(LINEAR, projection))
    vars(attention)["attend"] = Ranged(ATTENTION, attention.attend)
    engine.runner.model = Ranged(ELEMENTWISE, model)  # type: ignore[assignment]
    runner.sample = Ranged(SAMPLING, sample)  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, name, projection in plain:
            setattr(owner, name, projection)
        del vars(attention)["attend"]
        engine.runner.model, runner.sample = model, sample


def run_steps(engine: Engine, requests: Sequence[BenchRequest], count: int) -> Any:
    """The profile of `count` steps in the middle of these requests; what is left of them is aborted."""
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
                with record_function("step"):
                    engine.step()
        if engine.config.torch_device.type == "cuda":
            torch.cuda.synchronize()
    for id in ids:
        engine.abort(id)
    while engine.has_unfinished:
        engine.step()
    return profiler


def parts_on_cpu(profiler: Any) -> dict[str, float]:
    """Seconds of each part: ranges nest, and an outer one counts for what its inner ones leave."""
    total = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    head = sum(e.time_range.elapsed_us() for e in profiler.events() if e.name == LINEAR and not _inside_model(e)) / 1e6
    parts = {name: total.get(name, 0.0) for name in (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING)}
    parts[ELEMENTWISE] -= parts[LINEAR] - head + parts[ATTENTION]
    parts[HOST] = total.get("step", 0.0) - sum(parts.values())
    return parts


def _inside_model(event: Any) -> bool:
    return _part_of(event.cpu_parent) == ELEMENTWISE


def _part_of(event: Any) -> str | None:
    """The innermost named part that an event lies in."""
    while event is not None:
        if event.name in (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING):
            return event.name
        event = event.cpu_parent
    return None


def learn_kernels(profiler: Any) -> dict[str, str]:
    """Which part each kernel belongs to, by the time that it spent there."""
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    for event in profiler.events():
        part = _part_of(event) if event.kernels else None
        for kernel in event.kernels if part else ():
            spent[kernel.name][part or HOST] += kernel.duration
    return {kernel: parts.most_common(1)[0][0] for kernel, parts in spent.items()}


def parts_on_gpu(profiler: Any, known: dict[str, str]) -> dict[str, float]:
    """Seconds of each part: kernels by name; copies and whatever was not learnt count as host's; the rest is idle."""
    parts = dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE), 0.0)
    spans: list[tuple[float, float]] = []
    ranges = {"step", LINEAR, ATTENTION, ELEMENTWISE, SAMPLING}  # shown on the GPU's rows too, and no kernels
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in ranges:
            parts[known.get(event.name, HOST)] += event.time_range.elapsed_us() / 1e6
            spans.append((event.time_range.start, event.time_range.end))
    if spans:
        spans.sort()
        covered, end = 0.0, spans[0][0]
        for start, stop in spans:
            covered += max(0.0, stop - max(start, end))
            end = max(end, stop)
        parts[IDLE] = (end - spans[0][0] - covered) / 1e6
    return parts


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
    size = find_size(workload, None, "quick" if quick else "gpu" if place.type == "cuda" else "cpu")
    wanted = stage_options(stages.number(stage), {**size.options, **options})
    setting = Setting.of(model, dtype, str(place), size, {})
    setting.options.clear()
    setting.options.update(wanted)
    name = stages.short_name(stage)
    contestant = StageContestant(name, setting)
    engine = contestant.engine
    try:
        requests = size.requests(contestant.vocab_size, run=1)
        contestant.run(warmup_requests(requests, size.max_num_seqs, 4), lambda tokens: None)
        known: dict[str, str] = {}
        if place.type == "cuda":
            graphs, engine.runner.graphs = engine.runner.graphs, None
            with named_parts(engine):
                known = learn_kernels(run_steps(engine, requests, steps))
            engine.runner.graphs = graphs
        with named_parts(engine):
            profiler = run_steps(engine, requests, steps)
        parts = parts_on_gpu(profiler, known) if place.type == "cuda" else parts_on_cpu(profiler)
    finally:
        contestant.close()
    heading = f"{title(name)}, {workload}, {steps} steps · {model} · {dtype} · {place}"
    Console().print(table(parts, heading, steps))
    trace, picture = folder / f"{name}_profile.chrome.json", folder / f"{name}_profile.png"
    write_atomically(trace, lambda path: profiler.export_chrome_trace(str(path)))
    write_atomically(picture, lambda path: draw(parts, heading, steps, path))
    return [trace, picture]


def table(parts: dict[str, float], heading: str, steps: int) -> Table:
    whole = sum(parts.values()) or 1.0
    result = Table(title=heading, title_justify="left", title_style="", box=None)
    for column in ("where", "ms a step", "share"):
        result.add_column(column, justify="left" if column == "where" else "right")
    for name, seconds in parts.items():
        result.add_row(name, f"{seconds / steps * 1e3:.2f}", f"{seconds / whole:.0%}")
    return result


def draw(parts: dict[str, float], heading: str, steps: int, path: Path) -> None:
    """One bar from left to right, with each part's name, time and share."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(RC):
        figure, axis = plt.subplots(figsize=(11, 4.2))
        whole = sum(parts.values()) or 1.0
        for row, (name, seconds) in enumerate(parts.items()):
            axis.barh(row, seconds / steps * 1e3, color=COLORS[name])
            axis.text(
                seconds / steps * 1e3, row, f"  {seconds / steps * 1e3:.2f} ms, {seconds / whole:.0%}", va="center"
            )
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel("milliseconds a step")
        axis.set_title(heading, loc="left")
        figure.savefig(path)
        plt.close(figure)
