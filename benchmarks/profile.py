"""Where the time of some steps goes: linear layers, attention, elementwise (norms, rotary, SwiGLU), sampling, host,
idle; for each kind of step apart, and by kernels.

On a CPU the parts are ranges of one clock. On a GPU they are kernels: a first pass, without CUDA graphs, learns which
kernel belongs to which part; the pass that is measured runs as the engine runs, and its kernels are recognised by name.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function

import stages
from benchmarks import cli
from benchmarks import profile_parts as parts
from benchmarks.contestant import Setting
from benchmarks.environment import environment
from benchmarks.files import write_atomically, write_json
from benchmarks.plots.picture import save_picture
from benchmarks.profile_ranges import Around, named_parts
from benchmarks.stage_contestant import StageContestant
from benchmarks.style import title
from benchmarks.worker import warm_up
from benchmarks.workloads import BenchRequest, find_size, preset_of
from common import Engine, SamplingParams
from common.config import DEFAULT_MODEL, parse_device, stage_options
from common.errors import require

WIDTH = 110  # columns of the tables at least, also where the output is no terminal
NOTE = "elementwise: norms, rotary, SwiGLU. Where a kernel fuses one with its neighbour, it counts as the neighbour."


def run_steps(engine: Engine, requests: Sequence[BenchRequest], count: int, around: Around, seen: Counter[str]) -> None:
    """The first `count` steps of these requests, each in a range, and further ones until half as many have not been
    prefill alone; what is left of the requests is aborted. seen: steps by phase, as `named_parts` counts them."""
    ids = [engine.add_request(r.prompt, SamplingParams(max_tokens=r.max_tokens, ignore_eos=True)) for r in requests]
    while engine.has_unfinished and (seen.total() < count or seen.total() - seen["prefill"] < count // 2):
        with around(parts.STEP):
            engine.step()
    if engine.config.torch_device.type == "cuda":
        torch.cuda.synchronize()
    for id in ids:
        engine.abort(id)


def profiled(engine: Engine, requests: Sequence[BenchRequest], count: int, trace: Path) -> list[parts.Event]:
    """The events of `run_steps`, written to `trace` too, as Chrome's trace format."""
    activities = [ProfilerActivity.CPU]
    if engine.config.torch_device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of PyTorch's profiler: it says that it starts and stops
    elif engine.config.torch_device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler, named_parts(engine) as seen:
        run_steps(engine, requests, count, record_function, seen)
    while engine.has_unfinished:
        engine.step()
    write_atomically(trace, lambda path: profiler.export_chrome_trace(str(path)))
    return json.loads(trace.read_text())["traceEvents"]


def profile(
    stage: Annotated[str, typer.Option(help="The stage.")],
    workload: Annotated[str, typer.Option(help="Whose requests; see `workloads`.")] = "mixed",
    model: cli.Model = DEFAULT_MODEL,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "bf16",
    steps: Annotated[int, typer.Option(min=1, help="How many steps to look into.")] = 20,
    quick: cli.Quick = False,
    engine_pairs: cli.EngineOptions = None,
    folder: cli.Folder = cli.DEFAULT_FOLDER,
    nvtx: Annotated[
        bool, typer.Option("--nvtx", help="On a GPU, under `nsys profile`: mark steps and parts, write nothing.")
    ] = False,
) -> list[Path]:
    """Where the time of some steps goes, and of which kernels: tables, a picture, and a trace that Perfetto opens.

    Prints and returns the files written.
    """
    options = cli.engine_options(engine_pairs)
    place = parse_device(device)
    require(not nvtx or place.type == "cuda", "NVTX ranges are for a GPU: choose --device cuda, or leave --nvtx out")
    name = stages.short_name(stage)
    trace, picture, numbers = (folder / f"{name}_profile.{ending}" for ending in ("chrome.json", "png", "json"))
    stages.config_for(stage, {"model": model, "device": device, "dtype": dtype, **options})  # no silent leaving out
    size = find_size(workload, None, preset_of(place.type, quick))
    wanted = stage_options(stages.number(stage), {**size.options, **options})
    contestant = StageContestant(name, Setting.of(model, dtype, str(place), size, wanted))
    engine = contestant.engine
    try:
        requests = size.requests(contestant.vocab_size, run=1)
        warm_up(contestant, size, 4)
        if nvtx:
            mark(engine, requests, steps)
            return []
        known: dict[str, str] = {}
        if place.type == "cuda":
            graphs, engine.runner.graphs = engine.runner.graphs, None
            # Other tokens than those that are measured: a prefix cache must know none of these.
            known = parts.learn_kernels(profiled(engine, size.requests(contestant.vocab_size, run=2), steps, trace))
            known |= dict.fromkeys(parts.DRAWING, parts.SAMPLING)
            engine.runner.graphs = graphs
        events = profiled(engine, requests, steps, trace)
    finally:
        contestant.close()
    counts = parts.Phases(events).counts
    heading = f"{title(name)}, {workload}, {counts.total()} steps · {model} · {dtype} · {place}"
    spent = parts.parts_on_gpu(events, known) if place.type == "cuda" else parts.parts_on_cpu(events)
    found = parts.Profile(heading, counts, *spent)
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(heading, *found.tables(), NOTE, sep="\n")
    save_picture(picture, found.bars)
    work = [row for phase in counts for row in found.work_rows(phase)]
    values = {"environment": environment(), "profiled": heading, "records": found.rows(), "work": work}
    write_json(numbers, {"schema": "profile-2", **values})
    written = [trace, picture, numbers]
    print(*written, sep="\n")
    return written


def mark(engine: Engine, requests: Sequence[BenchRequest], steps: int) -> None:
    """Run the steps under NVTX ranges. Inside a step that is replayed from a CUDA graph there are none: add
    `--engine cuda_graphs=false` to see its parts."""
    torch.cuda.profiler.start()
    with named_parts(engine, torch.cuda.nvtx.range) as seen:
        run_steps(engine, requests, steps, torch.cuda.nvtx.range, seen)
    torch.cuda.profiler.stop()
    print(
        f"marked {seen.total()} steps: run this under `nsys profile --capture-range=cudaProfilerApi -o steps`, then\n"
        "`nsys stats -r nvtx_sum,cuda_gpu_kern_sum steps.nsys-rep`"
    )
