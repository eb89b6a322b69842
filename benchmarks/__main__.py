"""`python -m benchmarks`: the command line of the harness."""

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import attention, batches, cli, int4, parallel, quality
from benchmarks.compare import Results, make_comparison, run
from benchmarks.files import read_json
from benchmarks.gpu import JOBS, limits, run_parts
from benchmarks.peers import PEERS
from benchmarks.plots import draw_all
from benchmarks.profile import profile
from benchmarks.report.pictures import draw
from benchmarks.report.sources import read_machines
from benchmarks.report.write import write_all
from benchmarks.screen import Screen
from benchmarks.simulator.command import simulate
from benchmarks.table import render
from benchmarks.trace import trace
from benchmarks.workloads import WORKLOADS
from common.cli.app import run_app
from common.config import DEFAULT_MODEL
from common.errors import unknown

NAME = re.compile("|".join([*map(re.escape, PEERS), r"[^,\s]+"]))  # `llama.cpp Q4_0` has a space in it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Race the stages, and peers, on workloads that isolate one idea each.",
)


@app.command()
def compare(
    stages: Annotated[str, typer.Option(help="Stages (and peers), separated by commas; default: all stages.")] = "",
    workload: Annotated[str, typer.Option(help="One or several, separated by commas; see `workloads`.")] = "ladder",
    model: cli.Model = DEFAULT_MODEL,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "bf16",
    peers: Annotated[bool, typer.Option("--peers", help="Also run transformers and llama.cpp.")] = False,
    quick: cli.Quick = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also run the points of the workload's sweep.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed runs of each; default 3, and 1 for m0.")] = None,
    execution: Annotated[str | None, typer.Option(help="plain, fused, graphs or overlap; default: all.")] = None,
    engine: cli.EngineOptions = None,
    json_path: cli.JsonFile = None,
    out_dir: cli.PictureFolder = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds for one stage on one workload.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the results file already has.")] = False,
) -> None:
    """Run stages side by side, each in a fresh process; write JSON and pictures; print a table.

    A stage that fails is reported as failed, and the others go on. Exit status: 0, or 1 if a stage failed.
    """
    what: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "options": cli.engine_options(engine)}
    how: dict[str, Any] = {"quick": quick, "sweep": sweep, "repeats": repeats, "execution": execution}
    contestants, asked = (NAME.findall(text) for text in (stages, workload))
    plan = make_comparison(contestants, asked, peers=peers, **what, **how)
    path, folder = cli.places(json_path, out_dir, "bench.json")
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
    if redraw:
        for machine in read_machines().values():
            print(*(picture.path for picture in draw(machine, again=True)), sep="\n")
    elif json_path is None:
        for path in write_all():
            print(path)
    elif (values := read_json(json_path)).get("schema") == attention.SCHEMA:
        print(f"pictures: {attention.draw(values, out_dir or json_path.parent)}")
    else:
        _show(Results.read(json_path), out_dir or json_path.parent)


@app.command()
def gpu(
    job: Annotated[str, typer.Argument(help="bench: what execution gains, on the last stages; ladder: all stages.")],
    model: Annotated[str, typer.Option(help="A name, a folder, a hub id, or random:<preset>.")] = "random:qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    dtype: cli.Dtype = "bf16",
    quick: cli.Quick = False,
    out_dir: cli.Folder = cli.DEFAULT_FOLDER,
) -> None:
    """The jobs for a GPU. Run again after an interruption, they keep what they have measured."""
    _run_job(job, model, device, dtype, quick, out_dir)


@app.command()
def cpu_speed(quick: cli.Quick = False, out_dir: cli.Folder = cli.DEFAULT_FOLDER) -> None:
    """Measure m6, m7 and llama.cpp on a CPU: prompts, batches of 1 to 16, `mixed`; then a larger model."""
    _run_job("cpu_speed", DEFAULT_MODEL, "cpu", "bf16", quick, out_dir)


@app.command()
def interview(
    model: cli.Model = DEFAULT_MODEL,
    device: cli.Device = "cpu",
    dtype: cli.Dtype = "bf16",
    quick: cli.Quick = False,
    out_dir: cli.Folder = cli.DEFAULT_FOLDER,
) -> None:
    """Measure what the pages for interviews say aloud, each idea against the stage before it."""
    _run_job("interview", model, device, dtype, quick, out_dir)


def _run_job(job: str, model: str, device: str, dtype: str, quick: bool, out_dir: Path) -> None:
    """Run a job's parts and show each, and for `bench` the limits; then the time, and status 1 if a stage failed."""
    if job not in JOBS:
        raise unknown("job", job, JOBS)
    began, failed = time.perf_counter(), False
    for part, results in zip(JOBS[job], run_parts(JOBS[job], model, dtype, device, out_dir, quick), strict=True):
        _show(results, out_dir / part.name)
        failed |= any(not record.ok for record in results.records)
    for line in limits(model, dtype, device, out_dir, quick) if job == "bench" else ():
        print(line)
    if job == "bench":
        batches.run(model=model, device=device, dtype=dtype, quick=quick, path=out_dir / "batches.json")
    print(f"all of it took {(time.perf_counter() - began) / 60:.1f} minutes")
    if failed:
        raise typer.Exit(1)


@app.command()
def workloads() -> None:
    """List the workloads: what each does, and the claim that it tests."""
    for entry in WORKLOADS.values():
        print(f"{entry.name}: {entry.description}\n    claim: {entry.claim}")
        if entry.variants:
            print(f"    sweep: {', '.join(entry.variants)}")


def _show(results: Any, folder: Path) -> None:
    Console(width=None if sys.stdout.isatty() else 120).print(render(results))
    print(f"pictures: {', '.join(map(str, draw_all(results, folder))) or 'none, nothing was measured'}")


app.command("attention")(attention.run)
app.command("batches")(batches.run)
app.command("int4")(int4.run)
app.command("parallel")(parallel.run)
app.command("trace")(trace)
app.command("profile")(profile)
app.command("quality")(quality.measure_all)
app.command("simulate")(simulate)

if __name__ == "__main__":
    run_app(app)
