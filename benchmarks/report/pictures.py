"""Which pictures a report shows, and where each picture comes from. Each is drawn from results, into their folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import attention, busy, int4, quality
from benchmarks.plots import PICTURES
from benchmarks.plots.picture import save_picture
from benchmarks.plots.roofline import roofline
from benchmarks.report.blocks import Picture
from benchmarks.report.sources import Machine, read_machines
from benchmarks.style import RC

SHOWN = (
    ("ladder", "throughput"),
    ("mixed", "throughput"),
    ("mixed", "latency"),
    ("nano", "throughput"),
    ("single", "time-per-token"),
    ("memory_pressure", "memory"),
    ("memory_pressure", "block-size"),
    ("long_context", ""),
    ("interference", "stalls"),
    ("interference", "chunk-size"),
    ("shared_prefix", "hit-rate"),
    ("multi_turn", "by-turn"),
)
"""Workload and picture, by its name in `benchmarks.plots.PICTURES`: one for each claim."""

Drawing = tuple[Path, str, Callable[[], Figure]]
"""File, name, and what draws it."""


def draw(machine: Machine) -> list[Picture]:
    """What the report shows of a machine."""
    drawings = [found for pair in SHOWN if (found := _of_workload(machine, *pair))] + list(_of_sheets(machine))
    return [Picture(save_picture(path, figure), name) for path, name, figure in drawings if name]


def redraw(machine: Machine) -> list[Path]:
    """Draw again what the folder has, shown or not, so that it is what the code draws of the results as they are."""
    workloads = dict.fromkeys(workload for bench in machine.benches for workload in bench.results.config["workloads"])
    pairs = ((workload, name) for workload in workloads for name in PICTURES)
    there = ((w, name) for w, name in pairs if path_of(machine, w, name).exists())
    drawings = [found for pair in there if (found := _of_workload(machine, *pair))] + list(_of_sheets(machine))
    return [save_picture(path, figure) for path, _, figure in drawings if path.exists()]


def redraw_all() -> list[Path]:
    return [path for machine in read_machines().values() for path in redraw(machine)]


def path_of(machine: Machine, workload: str, name: str) -> Path:
    return machine.benches[0].path.parent / f"{machine.prefix}{workload}{name and '-'}{name}.png"


def _of_workload(machine: Machine, workload: str, name: str) -> Drawing | None:
    """From the file with the most runners, or from one with a sweep of the workload."""
    with_sweep = [b for b in machine.benches if any(r.workload == workload for r in b.results.sweeps)]
    for bench in filter(None, [machine.bench_of(workload), *with_sweep]):
        with plt.rc_context(RC):
            figure = PICTURES[name](bench.results, workload)
        if figure is not None:
            return path_of(machine, workload, name), f"{workload}{name and ', '}{name.replace('-', ' ')}", lambda: figure
    return None


def _of_sheets(machine: Machine) -> Iterator[Drawing]:
    """The roofline, and what other benches than `compare` draw; the name is empty where the report shows it not."""
    for sheet in machine.sheets:
        path, values = sheet.path, sheet.values
        schema = "quality" if sheet.kind == "quality" else values.get("schema")
        if schema == attention.SCHEMA:
            path = path.with_name("attention-roofline.png")
            yield path, "roofline of the attention kernels", partial(roofline, values, machine.title)
        elif schema == "quality" and any(row["name"] == "bf16" for row in sheet.rows):
            look = partial(quality.bars, sheet.rows, values["model"])
            yield path.with_name("quality.png"), "perplexity over bf16 of each kind of weights", look
        elif schema == int4.SCHEMA:
            look = partial(int4.draw, values, machine.title)
            yield path.with_name("int4.png"), "speed of 4-bit linear layers over 16-bit ones", look
        elif schema == busy.SCHEMA:
            yield path.with_suffix(".png"), "", partial(busy.draw, values, machine.title)
