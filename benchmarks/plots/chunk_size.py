"""The price of a chunk size: what those that decode wait, what the long prompt waits, and throughput."""

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.plots.bars import PAPER, Value, Write, finish, runs_of
from benchmarks.plots.stalls import group_ttft
from benchmarks.recipes import LONG
from benchmarks.record import Record
from benchmarks.style import SOFT, WIDTH, color, title
from benchmarks.table import rate, seconds

PREFIX = "chunk="
NO_SIZE = "auto"  # A dot apart, without a line


def _itl(name: str) -> Value:
    return lambda record: record.itl_s[name] if record.itl_s else None


def _long(record: Record) -> float | None:
    return found["p50"] if (found := group_ttft(LONG)(record)) else None


def _brief(value: float | None) -> str:
    """`3.1 ms`, `62 ms`, `1.4 s`: room is short."""
    return f"{value * 1e3:.0f} ms" if value and 0.01 <= value < 0.995 else seconds(value)


def chunk_size(results: Results, workload: str) -> plt.Figure | None:
    """From a sweep whose variants are named `chunk=256` and `chunk=auto`; None where there is none."""
    points = [r for r in results.sweeps if r.ok and r.workload == workload and (r.variant or "").startswith(PREFIX)]
    if not points:
        return None
    swept = dict.fromkeys(r.stage for r in points)
    whole = [r for r in results.records if r.ok and r.workload == workload and r.stage not in swept]
    figure, grid = plt.subplot_mosaic("aa;bc", figsize=(WIDTH, 8.2))
    axes = [grid[name] for name in "abc"]
    axes[0].set_yscale("log")
    _line(axes[0], points, whole, "max", _itl("max"), _brief, (0, 8), "center", "bottom")
    _line(axes[0], points, whole, "p99", _itl("p99"), _brief, (0, -8), "center", "top")
    _line(axes[1], points, whole, "", _long, _brief, (5, 6), "left", "bottom")
    _line(axes[2], points, whole, "", lambda r: r.output_tokens_per_s, rate, (0, 9), "center", "bottom")
    _scale(axes[0], points, _brief, "time between tokens of those that run")
    _scale(axes[1], points, _brief, "first token of the long prompt")
    _scale(axes[2], points, rate, "output tokens per second")
    how = f"{', '.join(title(stage) for stage in swept)}; auto chooses a size from the time that steps take. "
    if whole:
        how += f"Dashed: {', '.join(title(r.stage) for r in whole)}, with prompts taken whole. "
    how += f"Below: medians; the axis above is logarithmic. Of {runs_of([*points, *whole])}."
    return finish(figure, results, workload, points, _finding(points), how)


def _name(record: Record) -> str:
    return (record.variant or "").removeprefix(PREFIX)


def _names(points: Sequence[Record]) -> list[str]:
    """Sizes in order, then what is no size."""
    return sorted({_name(r) for r in points}, key=lambda name: int(name) if name.isdigit() else 1 << 62)


def _line(
    axis: plt.Axes, points: Sequence[Record], whole: Sequence[Record], label: str, value: Value,
    write: Write, offset: tuple[int, int], side: str, edge: str,
) -> None:  # fmt: skip
    """One figure of every stage over the sizes, each number `offset` points from its dot, on that side; dashed lines
    for the stages that take prompts whole."""
    names = _names(points)
    thick = 3.0 if edge == "bottom" else 1.8
    for stage in dict.fromkeys(r.stage for r in points):
        found = {_name(r): y for r in points if r.stage == stage and (y := value(r)) is not None}
        sizes = [name for name in names if name in found and name != NO_SIZE]
        xs = [names.index(name) for name in sizes]
        axis.plot(xs, [found[name] for name in sizes], marker="o", linewidth=thick, color=color(stage))
        if NO_SIZE in found:
            axis.plot(names.index(NO_SIZE), found[NO_SIZE], marker="D", markersize=7, color=color(stage))
        if label and sizes:
            _write(axis, label, (xs[0], found[sizes[0]]), (-9, 0), ha="right", va="center")
        for name, y in found.items():
            _write(axis, write(y), (names.index(name), y), offset, ha=side, va=edge, bbox=PAPER)
    for record in whole:
        if (y := value(record)) is not None:
            axis.axhline(y, color=color(record.stage), linestyle="--", linewidth=thick - 0.8)
            text = " ".join(part for part in (record.stage, label, write(y)) if part)
            look = {"color": color(record.stage), "fontweight": "bold", "fontsize": 12}
            drop = (0, 3 if edge == "bottom" else -3)
            _write(axis, text, (0.01, y), drop, xycoords=("axes fraction", "data"), va=edge, **look)


def _write(axis: plt.Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **look: Any) -> None:
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **{"fontsize": 12, **look})


def _scale(axis: plt.Axes, points: Sequence[Record], write: Write, title: str) -> None:
    axis.set_title(title, loc="left")
    names = _names(points)
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(axis="x", labelsize=12)
    axis.set_xlim(-1.9, len(names) - 0.1)
    axis.set_xlabel("prompt tokens in a step, at most", loc="left")
    low, high = axis.get_ylim()
    axis.set_ylim(*((low / 1.5, high * 1.5) if axis.get_yscale() == "log" else (0.0, high * 1.15)))
    axis.yaxis.set_major_formatter(lambda y, _: write(y).replace(".0 ", " ").removesuffix(".0") if y else "0")
    axis.yaxis.set_minor_formatter(lambda y, _: "")
    axis.grid(axis="y", color=SOFT, alpha=0.2)


def _finding(points: Sequence[Record]) -> str:
    """The smallest and the largest chunk of the first stage that was swept."""
    mine = [r for r in points if r.stage == points[0].stage and _name(r).isdigit()]
    ends = [min(mine, key=lambda r: int(_name(r))), max(mine, key=lambda r: int(_name(r)))] if mine else []
    if len(ends) < 2 or ends[0] is ends[1]:
        return f"{title(points[0].stage)} with chunks of one size"
    gaps, waits = ([_brief(value(r)) for r in ends] for value in (_itl("p99"), _long))
    sizes = [_name(r) for r in ends]
    finding = f"From chunks of {sizes[0]} to {sizes[1]}, the p99 time between tokens goes from {gaps[0]} to {gaps[1]}"
    return f"{finding}, and the long prompt's first token from {waits[0]} to {waits[1]}"
