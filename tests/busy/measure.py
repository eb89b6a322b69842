"""What an engine keeps of its speed next to busy processes: by how long idle OpenMP threads spin, and with threads that
follow the load.

Each stage has a process for each setting. They take turns: a round visits every load (busy loops next to the run) and
every process, so settings are compared within the same minutes of the same machine.

This is a program, not a part of the test package, which would bound it to one thread: run it with `make busy`.
"""

import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Column, Table

from benchmarks import cli
from benchmarks.environment import environment, short_hardware
from benchmarks.files import check_writable, write_json
from benchmarks.plots.busy import SCHEMA, busy_figure, rates_of
from benchmarks.plots.picture import save_picture
from common.cli.app import run_app
from common.config import DEFAULT_MODEL
from common.errors import UserError
from common.execution.threads import LIBRARY_DEFAULTS, SPIN_COUNT
from common.watch.progress import progress_bar

STAGES = ("m3", "m6")
LOADS = (0, 2, 8)
QUIET_SHARE = 0.95  # required share of the speed with the runtime's default, on a quiet machine
BUSY_SHARES = {2: 0.42, 8: 0.12}
"""Required share of the own speed on a quiet machine with two cores, by the number of busy loops."""
SECONDS = 5.0  # A run ends here: with the default, next to eight processes, it would take minutes


class Setting(NamedTuple):
    """`follows`: the threads are as many as other programs leave CPUs (`common.execution.cores`)."""

    spin_count: int
    follows: bool

    def __str__(self) -> str:
        return f"{self.spin_count:,}{' + following' if self.follows else ''}"


OURS = Setting(SPIN_COUNT, follows=True)
LIBRARYS = Setting(int(LIBRARY_DEFAULTS["GOMP_SPINCOUNT"]), follows=False)
SWEEP = [Setting(count, follows=False) for count in (0, 1_000, 10_000, 30_000, 100_000)]


Runs = dict[tuple[str, int, Setting], list[float]]
"""Output tokens per second, run by run, of a stage next to so many busy loops with a setting."""


class Contestant:
    """A worker with a setting of its own. It sleeps between its turns."""

    def __init__(self, stage: str, setting: Setting, model: str) -> None:
        self.stage, self.setting = stage, setting
        chosen = {"GOMP_SPINCOUNT": str(setting.spin_count)}
        if not setting.follows:
            chosen["OMP_DYNAMIC"] = "false"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), stage, model],
            env=os.environ | chosen,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def rate(self, seconds: float) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.stage} has ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def busy_loops(count: int) -> Generator[None]:
    """`count` other processes, each of which wants a CPU all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(settings: Sequence[Setting], rounds: int, model: str) -> Runs:
    runs: Runs = {(stage, busy, setting): [] for stage in STAGES for busy in LOADS for setting in settings}
    with ExitStack() as stack, progress_bar("busy", len(STAGES) * len(settings) + rounds * len(runs)) as advance:
        contestants: list[Contestant] = []
        for stage, setting in product(STAGES, settings):
            contestants.append(Contestant(stage, setting, model))
            stack.callback(contestants[-1].close)
            advance(1, f"{stage} is ready")
        for _, busy in product(range(rounds), LOADS):
            with busy_loops(busy):
                for one in contestants:
                    runs[one.stage, busy, one.setting].append(one.rate(SECONDS))
                    advance(1, f"{one.stage} next to {busy}")
    return runs


def verdicts(runs: Runs) -> list[dict[str, Any]]:
    """What is required of `OURS`: the share reached, the share asked, and whether that is met."""
    found: list[dict[str, Any]] = []
    for stage in STAGES:
        quiet, *busy = (median(runs[stage, busy, OURS]) for busy in (0, *BUSY_SHARES))
        shares = [("quiet, of the default's speed", quiet / median(runs[stage, 0, LIBRARYS]), QUIET_SHARE)]
        for (loops, asked), rate in zip(BUSY_SHARES.items(), busy, strict=True):
            shares.append((f"next to {loops} busy loops, of its quiet speed", rate / quiet, asked))
        found += [
            {"stage": stage, "what": w, "reached": r, "asked": asked, "met": r >= asked} for w, r, asked in shares
        ]
    return found


def run(path: Path, sweep: bool, rounds: int, model: str) -> bool:
    """Measure, write `path` and the picture next to it, print both tables. Is everything met?"""
    runs = measure([*(SWEEP if sweep else ()), LIBRARYS, OURS], rounds, model)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(),
        "config": {"model": model, "ours": str(OURS), "default": str(LIBRARYS), "rounds": rounds},
        "verdicts": verdicts(runs),
        "records": [
            {"stage": stage, "setting": str(setting), "busy": busy, "runs": rates, "tokens_per_s": median(rates)}
            for (stage, busy, setting), rates in runs.items()
        ],
    }
    write_json(path, results)
    hardware = short_hardware(results["environment"], "cpu")
    picture = save_picture(path.with_suffix(".png"), lambda: busy_figure(results, hardware))
    print_tables(results)
    print(f"wrote {path} and {picture}")
    return all(verdict["met"] for verdict in results["verdicts"])


def print_tables(results: dict[str, Any]) -> None:
    rates, settings = rates_of(results["records"]), list(dict.fromkeys(r["setting"] for r in results["records"]))
    columns = [Column(heading, justify="right") for heading in ("stage", "busy loops", *settings)]
    table = Table(*columns, title="output tokens/s by the spin count of idle threads (medians)")
    for stage, busy in product(STAGES, LOADS):
        table.add_row(stage, str(busy), *(f"{rates[stage, busy, setting]:.0f}" for setting in settings))
    console = Console()
    console.print(table)
    for verdict in results["verdicts"]:
        figures = f"{verdict['reached']:.2f} (asked {verdict['asked']})"
        console.print(f"{verdict['stage']} {verdict['what']}: {figures} {'met' if verdict['met'] else 'NOT MET'}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def busy(
    sweep: Annotated[bool, typer.Option("--sweep", help="Also other spin counts than ours and the default.")] = False,
    model: cli.Model = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each setting at each number of loops.")] = 5,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the picture goes next to them.")] = (
        cli.DEFAULT_FOLDER / "busy.json"
    ),
) -> None:
    """What m3 and m6 keep of their speed next to busy processes, by how long idle threads spin; CPU only.

    Exit status: 0, or 1 where a share that is asked for is not reached.
    """
    check_writable(json_path, json_path.with_suffix(".png"))
    if not run(json_path, sweep, rounds, model):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
