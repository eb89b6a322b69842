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
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from benchmarks import cli
from benchmarks.environment import environment, short_hardware
from benchmarks.files import check_writable, read_json, write_json
from benchmarks.plots.picture import headed, save_picture
from benchmarks.style import color, title
from common.cli.app import run_app
from common.config import DEFAULT_MODEL
from common.errors import UserError
from common.execution.threads import LIBRARY_DEFAULTS, SPIN_COUNT
from common.watch.progress import progress_bar

SCHEMA = "busy-1"
STYLES = {0: "o-", 2: "s--", 8: "^:"}
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
    print_tables(results)
    print(f"wrote {path} and {draw(results, path.parent)}")
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


def draw(results: dict[str, Any], folder: Path) -> Path:
    """The picture of results, those of an earlier run too; returns its file."""
    hardware = short_hardware(results["environment"], "cpu")
    return save_picture(folder / "busy.png", lambda: busy_figure(results, hardware))


def rates_of(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    return {(r["stage"], r["busy"], r["setting"]): r["tokens_per_s"] for r in records}


def busy_figure(results: dict[str, Any], hardware: str) -> Figure:
    """Output tokens per second by setting, a panel for each stage, a line for each number of busy loops."""
    records, ours = results["records"], results["config"]["ours"]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    names = list(dict.fromkeys(record["stage"] for record in records))
    rates = rates_of(records)
    figure, panels = plt.subplots(1, len(names), figsize=(11, 5), squeeze=False)
    for axes, stage in zip(panels[0], names, strict=True):
        for busy in sorted({record["busy"] for record in records}):
            heights = [rates[stage, busy, setting] for setting in settings]
            label = f"next to {busy} busy loops" if busy else "quiet machine"
            style, apart = STYLES.get(busy, "o-"), len(settings) - 1  # ours is not a spin count more: no line to it
            axes.plot(range(apart), heights[:apart], style, color=color(stage), label=label)
            axes.plot([apart + 0.3], heights[apart:], style, color=color(stage))
        places = [*range(len(settings) - 1), len(settings) - 0.7]
        axes.set_xticks(places, [_name(each, results["config"]["default"]) for each in settings])
        axes.tick_params(axis="x", labelsize=11)
        axes.set(xlabel="spin count of idle threads", ylabel="output tokens/s", title=title(stage))
        axes.set_ylim(0, 1.35 * max(r["tokens_per_s"] for r in records if r["stage"] == stage))
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=11)
    note = "Rightmost, what the engines do: as many threads as other programs leave CPUs. Median of "
    note += f"{results['config']['rounds']} runs. {results['config']['model']} · {hardware}"
    return headed(figure, _finding(records, ours, results["config"]["default"]), note)


def _name(setting: str, default: str) -> str:
    short = setting.replace(",000", "k").replace(" + following", "\nengines")
    return f"{short}\ndefault" if setting == default else short


def _finding(records: list[dict[str, Any]], ours: str, default: str) -> str:
    stages = list(dict.fromkeys(record["stage"] for record in records))
    rate = rates_of(records)
    parts: list[str] = []
    for busy in sorted({record["busy"] for record in records}):
        over = [rate[stage, busy, ours] / rate[stage, busy, default] for stage in stages]
        span = "–".join(dict.fromkeys(f"{share:.1f}" for share in (min(over), max(over))))
        parts.append(f"{span} {f'next to {busy} loops' if busy else 'quiet'}")
    return f"Engines run at this many times the default's speed: {', '.join(parts)}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def busy(
    sweep: Annotated[bool, typer.Option("--sweep", help="Also other spin counts than ours and the default.")] = False,
    model: cli.Model = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each setting at each number of loops.")] = 5,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the picture goes next to them.")] = (
        cli.DEFAULT_FOLDER / "busy.json"
    ),
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw the picture of --json again.")] = False,
) -> None:
    """What m3 and m6 keep of their speed next to busy processes, by how long idle threads spin; CPU only.

    Exit status: 0, or 1 where a share that is asked for is not reached.
    """
    check_writable(json_path, json_path.with_name("busy.png"))
    if redraw:
        print(draw(read_json(json_path), json_path.parent))
    elif not run(json_path, sweep, rounds, model):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
