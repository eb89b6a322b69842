"""Which pictures a report shows. They are drawn anew from the results, into the folder of the results."""

from __future__ import annotations

from matplotlib import pyplot as plt

from benchmarks import attention
from benchmarks.files import write_atomically
from benchmarks.int4 import SCHEMA as INT4
from benchmarks.plots import PICTURES, int4, quality
from benchmarks.report.blocks import Picture
from benchmarks.report.sources import Machine
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


def draw(machine: Machine) -> list[Picture]:
    """Each from the file with the most runners, or from one with a sweep of the workload."""
    drawn: list[Picture] = []
    for workload, name in SHOWN:
        with_sweep = [b for b in machine.benches if any(r.workload == workload for r in b.results.sweeps)]
        for bench in [machine.bench_of(workload), *with_sweep]:
            if bench is None:
                continue
            with plt.rc_context(RC):
                figure = PICTURES[name](bench.results, workload)
                if figure is None:
                    continue
                path = bench.path.parent / f"{machine.prefix}{workload}{name and '-'}{name}.png"
                write_atomically(path, figure.savefig)
                plt.close(figure)
            drawn.append(Picture(path, f"{workload}{name and ', '}{name.replace('-', ' ')}"))
            break
    for sheet in machine.sheets_of("attention"):
        drawn.append(Picture(attention.draw(sheet.values, sheet.path.parent), "roofline of the attention kernels"))
    for sheet in machine.sheets_of("quality"):
        if any(row["name"] == "bf16" for row in sheet.rows):
            path = sheet.path.with_name("quality.png")
            quality.draw(sheet.rows, path)
            drawn.append(Picture(path, "perplexity over bf16 of each kind of weights"))
    for sheet in machine.sheets:
        if sheet.values.get("schema") == INT4:
            path = sheet.path.with_name("int4.png")
            figure = int4.draw(sheet.values, machine.title)
            write_atomically(path, lambda scratch, figure=figure: int4.save(figure, scratch))
            drawn.append(Picture(path, "speed of 4-bit linear layers over 16-bit ones"))
    return drawn
