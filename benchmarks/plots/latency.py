"""Time to the first token, and between tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare import Results
from benchmarks.plots.bars import (
    at_work,
    bars,
    figure_with_rows,
    finish,
    measured_twice,
    name_rows,
    notes_on_rows,
    runs_of,
    with_execution_only,
)
from benchmarks.record import Record, Summary
from benchmarks.style import INK, title
from benchmarks.table import DASH, seconds
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
    how = f"Bar: median; dot: 99th percentile, over all requests of {runs_of(records)}. Waiting in the queue counts."
    how += notes_on_rows(results, records, workload)
    return finish(figure, results, workload, records, _finding(results, records, workload), how)


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


def _finding(results: Results, records: Sequence[Record], workload: str) -> str:
    """The soonest idea alone against the first stage that ran this workload; execution is said apart."""
    stages = [r for r in at_work([r for r in records if r.workload == workload]) if r.ttft_s]
    with_row = {r.stage for r in stages if r.plain}
    ideas = {r.stage: r for r in stages if r.plain or r.stage not in with_row}
    found = {r.stage: r.ttft_s["p50"] for r in (ideas.values() or records) if r.ttft_s}
    first, best = next(iter(found)), min(found, key=lambda stage: found[stage])
    if len(found) < 2:
        return f"{title(first)}: half of the first tokens come within {seconds(found[first])}"
    if best == first:
        return f"No idea at work here brings the first token sooner than {title(first)}"
    ways = [with_execution_only(results, ideas[stage]) and stage not in with_row for stage in (best, first)]
    name = title(best) + (" with execution" if ways == [True, False] else "")
    finding = f"Half of the first tokens come within {seconds(found[best])} with {name}, "
    finding += f"{seconds(found[first])} with {title(first)}"
    whole = next((r.ttft_s["p50"] for r in stages if r.stage == best and not r.plain and r.ttft_s), None)
    return finding + (f"; with execution {seconds(whole)}" if best in with_row else "")
