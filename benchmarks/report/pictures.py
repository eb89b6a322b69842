"""Which pictures a report shows. Each is drawn again from the results, into their folder."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from benchmarks import attention, int4, plots, quality
from benchmarks.execution import PLAIN
from benchmarks.plots.batches import batches_figure
from benchmarks.plots.picture import save_picture
from benchmarks.report import cpu_speed
from benchmarks.report.blocks import Picture
from benchmarks.report.sources import Machine
from benchmarks.simulator.pictures import draw as simulated

SHOWN = (
    *(("ladder", "throughput"), ("mixed", "throughput"), ("mixed", "latency"), ("nano", "throughput")),
    *(("single", "time-per-token"), ("memory_pressure", "memory"), ("memory_pressure", "block-size")),
    *(("long_context", ""), ("interference", "stalls"), ("interference", "chunk-size")),
    *(("shared_prefix", "hit-rate"), ("multi_turn", "by-turn")),
)
"""Workload and picture, by its name in `benchmarks.plots.PICTURES`: one for each claim."""


def draw(machine: Machine, again: bool = False) -> Iterator[Picture]:
    """Each from a sweep of the ideas alone, else from the file with the most runners, else from any sweep.
    again: instead of what the report shows, all pictures that the folder has already."""
    workloads = dict.fromkeys(workload for bench in machine.benches for workload in bench.results.config["workloads"])
    for workload, name in product(workloads, plots.PICTURES) if again else SHOWN:
        with_sweep = [b for b in machine.benches if any(r.workload == workload for r in b.results.sweeps)]
        alone = [bench for bench in with_sweep if bench.results.config.get("execution") == PLAIN]
        for bench in filter(None, [*alone, machine.bench_of(workload), *with_sweep]):
            path = bench.path.parent / f"{machine.prefix}{plots.file_name(workload, name)}"
            if again and not path.exists():
                break
            if plots.draw(bench.results, workload, name, path):
                yield Picture(path, f"{workload}{name and ', '}{name.replace('-', ' ')}")
                break
    if ratios := cpu_speed.reached(machine):
        path = machine.benches[0].path.with_name("cpu_speed.png")
        save_picture(path, partial(cpu_speed.draw, ratios, machine.title))
        yield Picture(path, "ratios of speeds on a CPU, and what was wanted of them")
    for sheet in machine.sheets_of("attention"):
        yield Picture(attention.draw(sheet.values, sheet.path.parent), "roofline of the attention kernels")
    for sheet in machine.sheets_of("batches"):
        look = partial(batches_figure, sheet.values, machine.title)
        path = save_picture(sheet.path.with_name("batches.png"), look)
        yield Picture(path, "tokens a second of one request, by batch")
    for sheet in machine.sheets_of("quality"):
        if any(row["name"] == "bf16" for row in sheet.rows):
            look = partial(quality.bars, sheet.rows, sheet.values["model"])
            path = save_picture(sheet.path.with_name("quality.png"), look)
            yield Picture(path, "perplexity over bf16 of each kind of weights")
    for sheet in machine.sheets_of("simulated"):
        yield Picture(simulated(sheet.values, sheet.path.parent), f"simulated: {sheet.rows[0]['answer']}")
    for sheet in machine.sheets:
        if sheet.values.get("schema") == int4.SCHEMA:
            path = save_picture(sheet.path.with_name("int4.png"), partial(int4.draw, sheet.values, machine.title))
            yield Picture(path, "speed of 4-bit linear layers over 16-bit ones")
