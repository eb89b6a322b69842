"""Time to the first token, and between tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.bars import bars, figure_with_rows, finish, measured_twice, name_rows
from benchmarks.record import Record, Summary
from benchmarks.style import INK, title
from benchmarks.table import DASH, EXECUTION, seconds
from benchmarks.workloads import find


def latency(results: Results, workload: str) -> Figure | None:
    records = [r for r in measured_twice(results, workload) if r.ttft_s]
    if not records or find(workload).columns == "stalls":  # those have a picture that tells groups apart
        return None
    figure, (left, right) = figure_with_rows(2, len(records))
    summary_bars(left, records, workload, lambda r: r.ttft_s, "p99")
    summary_bars(right, records, workload, lambda r: r.itl_s, "p99")
    name_rows(left, records, workload)
    right.tick_params(axis="y", length=0)
    left.set_title("time to first token (less is better)", loc="left")
    right.set_title("time between tokens (less is better)", loc="left")
    how = "Bar: median; dot: 99th percentile, over all requests of the median run. Waiting for a place counts."
    if any(r.workload != workload for r in records):
        how += " Hatched: ran another workload."
    return finish(figure, results, workload, records, _finding(records), how)


def summary_bars(
    axis: Axes, records: Sequence[Record], workload: str, summary_of: Callable[[Record], Summary | None], *ends: str
) -> None:
    """A bar up to the median, a dot at the last of these other figures of the summary, and all of them behind it."""
    end = ends[-1]

    def value(record: Record, name: str = "p50") -> float | None:
        return (summary_of(record) or {}).get(name)

    def label(record: Record) -> str:
        if not (summary := summary_of(record)):
            return DASH
        return ", ".join([f" {seconds(summary['p50'])}", *(f"{name} {seconds(summary[name])}" for name in ends)])

    bars(axis, records, workload, value, lambda record: value(record, end), label)
    widest = max((value(record, end) or 0.0 for record in records), default=0.0) or 1.0
    axis.set_xlim(0, widest * (1.2 + len(ends)))
    for row, summary in enumerate(map(summary_of, records)):
        if summary:
            axis.plot([summary["p50"], summary[end]], [row, row], color=INK, linewidth=1.4)
            axis.plot(summary[end], row, "o", color=INK, markersize=6)


def _finding(records: Sequence[Record]) -> str:
    medians = [(r, r.ttft_s["p50"]) for r in records if r.ttft_s]
    own = [pair for pair in medians if pair[0].stage not in PEERS]
    first, there = (own or medians)[0]
    if len(own) < 2:
        return f"{title(first.stage)}: half of the first tokens come within {seconds(there)}"
    best, here = min(own, key=lambda pair: pair[1])
    if best is first:
        return f"No stage brings the first token sooner than {title(first.stage)} here"
    twice = not best.plain and any(r.plain and r.stage == best.stage for r, _ in own)
    name = f"{title(best.stage)} {EXECUTION}" if twice else title(best.stage)
    before = f"{seconds(there)} with {title(first.stage)}"
    return f"Half of the first tokens come within {seconds(here)} with {name}, {before}"
