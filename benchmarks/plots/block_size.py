"""The price of a block size: throughput, and the reserved token slots that stay empty."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from benchmarks.compare import Results
from benchmarks.plots.bars import PAPER, Value, finish, runs_of
from benchmarks.record import Record
from benchmarks.style import SOFT, WIDTH, color, title


def block_size(results: Results, workload: str) -> plt.Figure | None:
    """From a sweep whose variants are named `block_size=16`; None where there is none."""
    there = (r for r in results.sweeps if r.ok and r.workload == workload)
    points = [r for r in there if (r.variant or "").startswith("block_size")]
    if not points:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.8))
    _lines(left, points, lambda r: r.output_tokens_per_s, "output tokens per second", "{:.0f}")
    _lines(right, points, _empty, "reserved slots that stay empty", "{:.0%}")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    stages = ", ".join(title(stage) for stage in dict.fromkeys(r.stage for r in points))
    how = f"{stages}. Left: {runs_of(points)}, a thin line from the slowest to the fastest. Right: the mean over time."
    return finish(figure, results, workload, points, _finding(points), how)


def _empty(record: Record) -> float | None:
    return None if record.kv_utilization is None else 1.0 - record.kv_utilization


def _size(record: Record) -> int:
    return int((record.variant or "").partition("=")[2])


def _lines(axis: plt.Axes, points: list[Record], value: Value, name: str, form: str) -> None:
    sizes = sorted({_size(r) for r in points})
    for stage in dict.fromkeys(r.stage for r in points):
        mine = {_size(r): r for r in points if r.stage == stage}
        xs = [sizes.index(size) for size in sizes if size in mine]
        ys = [value(mine[size]) or 0.0 for size in sizes if size in mine]
        axis.plot(xs, ys, marker="o", linewidth=3, markersize=8, color=color(stage))
        for x, y in zip(xs, ys, strict=True):
            look: Any = {"xytext": (0, 9), "textcoords": "offset points", "fontsize": 12, "bbox": PAPER}
            axis.annotate(form.format(y), (x, y), ha="center", **look)
            repeats = mine[sizes[x]].output_tokens_per_s_repeats or []
            if value is not _empty and len(repeats) > 1:
                axis.vlines(x, min(repeats), max(repeats), color=color(stage), alpha=0.5)
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set(ylim=(0, axis.get_ylim()[1] * 1.12), xlabel="block size, tokens")
    axis.set_title(name, loc="left")
    axis.grid(axis="y", color=SOFT, alpha=0.2)


def _finding(points: list[Record]) -> str:
    smallest, largest = min(points, key=_size), max(points, key=_size)
    low, high = _empty(smallest) or 0.0, _empty(largest) or 0.0
    large = f"Blocks of {_size(largest)} leave {high:.0%} of what they reserve empty"
    small = f"those of {_size(smallest)} leave {low:.0%}"
    return f"{large}, {small}; {largest.peak_running} requests run at once instead of {smallest.peak_running}"
