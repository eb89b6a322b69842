"""The scenario behind `make stage3 trace`: a few requests in little memory, recorded step by step. From m6 on their
prompts begin alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import stages
from benchmarks import cli
from benchmarks.files import write_json
from benchmarks.plots.memory_map import memory_map_figure
from benchmarks.plots.picture import save_picture
from benchmarks.plots.prefix_tree import prefix_tree_figure
from benchmarks.plots.timeline import Traced, timeline_figure
from benchmarks.prefixes import record_prefixes
from benchmarks.recipes import Draw
from benchmarks.schedule import schedule
from common import SamplingParams
from common.config import DEFAULT_MODEL, parse_device, parse_dtype, stage_options
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from common.watch.trace import StepTrace

NUM_REQUESTS = 16
INPUTS, OUTPUTS, LONG_OUTPUTS, LONG_SHARE = (16, 64), (8, 40), (80, 120), 0.4
MAX_MODEL_LEN = 256
KV_TOKENS = 2 * MAX_MODEL_LEN
SHARED = 64  # tokens that the prompts begin with, in the pictures of m6 and m7
SWAP_TOKENS = 128
"""Two slots of `MAX_MODEL_LEN` tokens: m1 and m2 run two requests, the paged stages as many as really fit. The pool on
the CPU takes one preempted request; the next one is recomputed."""
TIMED = ("m4", "m7")  # they do in the same steps what the stage before them does, in less time: that is their picture


def record(
    stage: str, model: str, device: str, dtype: str, options: Mapping[str, Any] | None = None, shared: int = 0
) -> Traced:
    """Run the scenario on a stage; of the options it takes those that it has. All prompts begin with `shared` tokens
    that are the same."""
    place = parse_device(device)
    token_bytes = kv_bytes_per_token(open_source(model, place).config, parse_dtype(dtype))
    wanted = {
        "max_num_seqs": NUM_REQUESTS,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory": KV_TOKENS * token_bytes,
        "swap_space": SWAP_TOKENS * token_bytes,
        **(options or {}),
    }
    own = stage_options(stages.number(stage), wanted)
    with stages.build(stage, model=model, device=place, dtype=dtype, **own) as engine:
        draw = Draw(engine.runner.model.config.vocab_size)
        outputs = [LONG_OUTPUTS if long else OUTPUTS for long in draw.marked(NUM_REQUESTS, LONG_SHARE)]
        beginning = draw.tokens(shared)
        prompts = [beginning + draw.tokens(draw.length(INPUTS)) for _ in range(NUM_REQUESTS)]
        params = [SamplingParams(max_tokens=draw.length(span), ignore_eos=True) for span in outputs]
        engine.trace = StepTrace(regions=True)
        engine.generate(prompts, params, progress=None)
        return Traced(stages.short_name(stage), engine.trace, engine.scheduler.cache.usage().capacity)


def trace(
    stage: Annotated[str, typer.Option(help="The stage; the one before it is recorded too.")],
    model: cli.Model = DEFAULT_MODEL,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "bf16",
    folder: cli.Folder = cli.DEFAULT_FOLDER,
    engine: cli.EngineOptions = None,
) -> list[Path]:
    """Record some requests step by step: a timeline, a map of the KV memory, and traces that Perfetto opens.

    Prints and returns the files written.
    """
    options, name = cli.engine_options(engine), stages.short_name(stage)
    stages.config_for(stage, {"model": model, "device": device, "dtype": dtype, **options})
    number = stages.number(stage)
    pair = [stages.short_name(n) for n in range(max(0, number - 1), number + 1)]
    shared = SHARED if number >= 6 else 0
    # The stage before it, too, where that has another schedule or memory.
    runs = [record(one, model, device, dtype, options or None, shared) for one in (pair[1:] if name in TIMED else pair)]
    written: list[Path] = []
    for run in runs:
        count, taken = len(run.trace.steps), sum(step.duration for step in run.trace.steps)
        print(f"{run.stage}: {count} steps, recording them took {run.trace.cost / taken:.2%} of their time")
        if (idle := run.trace.idle_share) is not None:
            print(f"{run.stage}: the GPU had no step to compute for {idle:.1%} of the time")
        for kind, values in (("trace", run.trace.to_json()), ("trace.chrome", run.trace.to_chrome())):
            written.append(folder / f"{run.stage}_{kind}.json")
            write_json(written[-1], values, indent=None)
    written.append(save_picture(folder / f"{name}_timeline.png", lambda: timeline_figure(runs)))
    if any(run.capacity for run in runs):
        written.append(save_picture(folder / f"{name}_memory.png", lambda: memory_map_figure(runs)))
    if name in ("m5", *TIMED):
        written.append(schedule(pair, model, device, dtype, folder / f"{name}_schedule.png"))
    if name == "m6":
        nodes, hit_rate = record_prefixes("m6", model, device, dtype, options)
        written.append(save_picture(folder / "m6_tree.png", lambda: prefix_tree_figure(nodes, hit_rate)))
    print(*written, sep="\n")
    return written
