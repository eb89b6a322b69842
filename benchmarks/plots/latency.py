"""Time to the first token, and between tokens."""

import math
from collections.abc import Callable, Sequence

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.plots.bars import bars, figure_with_rows, finish, headline, measured_both, name_rows, row_notes, runs_of
from benchmarks.record import Record, Summary
from benchmarks.style import INK, title
from benchmarks.table import DASH, seconds
from benchmarks.workloads import find


def latency(results: Results, workload: str) -> plt.Figure | None:
    records = [r for r in measured_both(results, workload) if r.ttft_s]
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
    how += row_notes(results, records, workload)
    return finish(figure, results, workload, records, _finding(results, records, workload), how)


def summary_bars(
    axis: plt.Axes, records: Sequence[Record], workload: str, summary_of: Callable[[Record], Summary | None], *ends: str
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

    def median(record: Record) -> float:
        return record.ttft_s["p50"] if record.ttft_s else math.inf

    ran = [r for r in records if r.workload == workload and not r.plain] or list(records)
    if (said := headline(results, ran, median)) is None:
        return f"{title(ran[0].stage)}: half of the first tokens come within {seconds(median(ran[0]))}"
    first, best, whole, name = said
    finding = f"Half of the first tokens come within {seconds(median(best))} with {name}, "
    finding += f"{seconds(median(first))} with {title(first.stage)}"
    return finding + ("" if whole is best else f"; with execution {seconds(median(whole))}")
