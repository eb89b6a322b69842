"""`python -m benchmarks`: the command line of the harness."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.files import check_writable, read_json
from common.cli.app import run_app
from common.config import DEFAULT_MODEL, parse_device
from common.errors import require, unknown

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Race the stages, and peers, on workloads that isolate one idea each.",
)
DEFAULT_FOLDER = Path("reports/local")
PICTURE = "picture.png"  # any picture, to check that the folder takes files

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PictureFolder = Annotated[Path | None, typer.Option(help="Of pictures; default: that of --json, or reports/local.")]
Model = Annotated[str, typer.Option(help="A name, a folder, a GGUF file, a hub id, or random:<preset>.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32; bf16 is what people deploy.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to test the harness; measures nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what the results file already has.")]
EngineOptions = Annotated[list[str] | None, typer.Option("--engine", help="NAME=VALUE: an engine option.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Results; default: in the folder of the pictures.")]


def _names(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _places(json_path: Path | None, out_dir: Path | None, name: str) -> tuple[Path, Path]:
    """The results file, called `name` unless it is given, and the folder of the pictures. Both can be written."""
    folder = out_dir or (json_path.parent if json_path else DEFAULT_FOLDER)
    path = json_path or folder / name
    check_writable(path, folder / PICTURE)
    return path, folder


def _options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` as engine options; a value is JSON where it can be read as JSON, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals), f"--engine takes NAME=VALUE, for example kv_cache_memory=100000000, not {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


@app.command()
def compare(
    stages: Annotated[str, typer.Option(help="Stages (and peers), separated by commas; default: all stages.")] = "",
    workload: Annotated[str, typer.Option(help="One or several, separated by commas; see `workloads`.")] = "ladder",
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    peers: Annotated[bool, typer.Option("--peers", help="Also run transformers and llama.cpp.")] = False,
    quick: Quick = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also run the points of the workload's sweep.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed runs of each; default 3, and 1 for m0.")] = None,
    execution: Annotated[str | None, typer.Option(help="plain, fused, graphs or overlap; default: all.")] = None,
    engine: EngineOptions = None,
    json_path: JsonFile = None,
    out_dir: PictureFolder = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds for one stage on one workload.")] = None,
    resume: Resume = False,
) -> None:
    """Run stages side by side, each in a fresh process; write JSON and pictures; print a table.

    A stage that fails is reported as failed, and the others go on. Exit status: 0, or 1 if a stage failed.
    """
    from benchmarks.compare import make_comparison, run
    from benchmarks.peers import PEERS
    from benchmarks.screen import Screen

    what: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "options": _options(engine or [])}
    how: dict[str, Any] = {"quick": quick, "sweep": sweep, "repeats": repeats, "execution": execution}
    plan = make_comparison(_names(stages), _names(workload), peers=peers, **what, **how)
    path, folder = _places(json_path, out_dir, "bench.json")
    with Screen() as screen:
        results = run(plan, path, screen.started, screen.result, resume=resume, timeout=timeout)
    _show(results, folder)
    print(f"results: {path}")
    if any(not r.ok and r.stage not in PEERS for r in results.records + results.sweeps):
        raise typer.Exit(1)


@app.command()
def report(
    json_path: Annotated[Path | None, typer.Option("--json", help="Only this file: its table and pictures.")] = None,
    out_dir: Annotated[Path | None, typer.Option(help="With --json: of the pictures; default: the file's.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw every picture there is again.")] = False,
) -> None:
    """Write the report and the interview guide from all results under reports/, your own (reports/local) too.

    With --json: print the table and draw the pictures of that file; of `attention`, the roofline.
    """
    from benchmarks import attention as kernels
    from benchmarks.compare import Results
    from benchmarks.report.pictures import draw
    from benchmarks.report.sources import read_machines
    from benchmarks.report.write import write_all

    if redraw:
        for machine in read_machines().values():
            print(*(picture.path for picture in draw(machine, again=True)), sep="\n")
    elif json_path is None:
        for path in write_all():
            print(path)
    elif (values := read_json(json_path)).get("schema") == kernels.SCHEMA:
        print(f"pictures: {kernels.draw(values, out_dir or json_path.parent)}")
    else:
        _show(Results.read(json_path), out_dir or json_path.parent)


@app.command()
def attention(
    device: Device = "auto",
    dtype: Dtype = "bf16",
    quick: Quick = False,
    json_path: JsonFile = None,
    out_dir: PictureFolder = None,
) -> None:
    """Time m4's attention backends alone, shape by shape, next to the ceilings of this machine; draw a roofline."""
    from benchmarks.attention import run as run_kernels

    path, folder = _places(json_path, out_dir, "attention.json")
    run_kernels(device, dtype, path, quick, folder)


@app.command()
def fused(
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ...")] = "auto",
    dtype: Dtype = "bf16",
    model: Annotated[str, typer.Option(help="Whose shapes: qwen3-0.6b, qwen3-4b, llama3-1b, ...")] = "qwen3-0.6b",
    quick: Quick = False,
    json_path: JsonFile = None,
) -> None:
    """Time the fused kernels alone against plain PyTorch, at the shapes of a model, next to a copy."""
    from benchmarks.fused import run as run_fused
    from common.models.sources.random_weights import PRESETS

    if model not in PRESETS:
        raise unknown("model", model, PRESETS)
    path = json_path or DEFAULT_FOLDER / "fused.json"
    check_writable(path)
    run_fused(device, dtype, model, path, quick)


@app.command()
def int4(
    device: Device = "auto",
    quick: Quick = False,
    resume: Resume = False,
    json_path: JsonFile = None,
    out_dir: PictureFolder = None,
) -> None:
    """Time m7's 4-bit layers alone, at 1 to 64 rows, next to 16-bit products and the speed of memory."""
    from benchmarks.int4 import run as run_layers

    path, folder = _places(json_path, out_dir, "int4.json")
    run_layers(device, path, quick, folder, resume)


@app.command()
def trace(
    stage: Annotated[str, typer.Option(help="The stage; the one before it is recorded too.")],
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    engine: EngineOptions = None,
    out_dir: Annotated[Path, typer.Option(help="Folder of traces and pictures.")] = DEFAULT_FOLDER,
) -> None:
    """Record some requests step by step: a timeline, a map of the KV memory, and traces that Perfetto opens."""
    from benchmarks.trace import trace as record_and_draw

    check_writable(out_dir / PICTURE)
    for path in record_and_draw(stage, model, device, dtype, out_dir, _options(engine or [])):
        print(path)


@app.command()
def gpu(
    job: Annotated[str, typer.Argument(help="bench: what execution gains, on the last stages; ladder: all stages.")],
    model: Annotated[str, typer.Option(help="A name, a folder, a hub id, or random:<preset>.")] = "random:qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    dtype: Dtype = "bf16",
    quick: Quick = False,
    out_dir: Annotated[Path, typer.Option(help="Folder of results and pictures.")] = DEFAULT_FOLDER,
) -> None:
    """The jobs for a GPU. Run again after an interruption, they keep what they have measured."""
    _run_job(job, model, device, dtype, quick, out_dir)


@app.command()
def interview(
    model: Model = DEFAULT_MODEL,
    device: Device = "cpu",
    dtype: Dtype = "bf16",
    quick: Quick = False,
    out_dir: Annotated[Path, typer.Option(help="Folder of results and pictures.")] = DEFAULT_FOLDER,
) -> None:
    """Measure what the pages for interviews say aloud, each idea against the stage before it."""
    _run_job("interview", model, device, dtype, quick, out_dir)


def _run_job(job: str, model: str, device: str, dtype: str, quick: bool, out_dir: Path) -> None:
    """Run a job's parts and show each, and for `bench` the limits; then the time, and status 1 if a stage failed."""
    from benchmarks.gpu import JOBS, limits, run_parts

    if job not in JOBS:
        raise unknown("job", job, JOBS)
    began, failed = time.perf_counter(), False
    for part, results in zip(JOBS[job], run_parts(JOBS[job], model, dtype, device, out_dir, quick), strict=True):
        _show(results, out_dir / part.name)
        failed |= any(not record.ok for record in results.records)
    for line in limits(model, dtype, device, out_dir, quick) if job == "bench" else ():
        print(line)
    print(f"all of it took {(time.perf_counter() - began) / 60:.1f} minutes")
    if failed:
        raise typer.Exit(1)


@app.command()
def profile(
    stage: Annotated[str, typer.Option(help="The stage.")],
    workload: Annotated[str, typer.Option(help="Whose requests; see `workloads`.")] = "mixed",
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    steps: Annotated[int, typer.Option(min=1, help="How many steps to look into.")] = 20,
    quick: Quick = False,
    engine: EngineOptions = None,
    nvtx: Annotated[
        bool, typer.Option("--nvtx", help="On a GPU, under `nsys profile`: mark steps and parts, write nothing.")
    ] = False,
    out_dir: Annotated[Path, typer.Option(help="Folder of the trace and the picture.")] = DEFAULT_FOLDER,
) -> None:
    """Where the time of some steps goes, and of which kernels: tables, a picture, and a trace that Perfetto opens."""
    from benchmarks.profile import profile as look

    check_writable(out_dir / PICTURE)
    for path in look(stage, workload, model, device, dtype, steps, quick, _options(engine or []), out_dir, nvtx):
        print(path)


@app.command()
def quality(
    model: Model = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Where the record and the picture go.")] = DEFAULT_FOLDER,
    only: Annotated[str, typer.Option(help="Rows to measure now, by a part of their name.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Rows measured before, too.")] = False,
    device: Device = "auto",
) -> None:
    """Perplexity and greedy agreement of bf16, int8, int4, NF4, GPTQ and int8 head, as a table and a picture."""
    from benchmarks.quality import measure_all

    measure_all(model, parse_device(device), out, only, again)


@app.command()
def workloads() -> None:
    """List the workloads: what each does, and the claim that it tests."""
    from benchmarks.workloads import WORKLOADS

    for entry in WORKLOADS.values():
        print(f"{entry.name}: {entry.description}\n    claim: {entry.claim}")
        if entry.variants:
            print(f"    sweep: {', '.join(entry.variants)}")


def _show(results: Any, folder: Path) -> None:
    from benchmarks.plots import draw_all
    from benchmarks.table import render

    Console(width=None if sys.stdout.isatty() else 120).print(render(results))
    print(f"pictures: {', '.join(map(str, draw_all(results, folder))) or 'none, nothing was measured'}")


if __name__ == "__main__":
    run_app(app)
