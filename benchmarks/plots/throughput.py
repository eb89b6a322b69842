"""Output tokens per second of every stage."""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.bars import bars, figure_with_rows, finish, measured, name_rows, times, whisker
from benchmarks.record import Record
from benchmarks.style import title
from benchmarks.table import factor, rate


def throughput(results: Results, workload: str) -> Figure | None:
    records = measured(results, workload)
    if not records:
        return None
    first = records[0]

    def label(record: Record) -> str:
        gain = factor(record, first)
        return f"{rate(record.output_tokens_per_s)}" + ("" if gain == "–" else f"  ({gain}×)")

    figure, (axis,) = figure_with_rows(1, len(records))
    bars(axis, records, workload, lambda r: r.output_tokens_per_s, lambda r: max(r.output_tokens_per_s_repeats), label)
    for row, record in enumerate(records):
        if len(record.output_tokens_per_s_repeats) > 1:
            whisker(axis, row, min(record.output_tokens_per_s_repeats), max(record.output_tokens_per_s_repeats))
    name_rows(axis, records, workload)
    axis.set_title("output tokens per second (more is better)", loc="left")
    how = "Bar: median run; line: slowest to fastest run."
    if len(records) > 1:
        how += f" In brackets: times {title(first.stage)}."
    if any(r.workload != workload for r in records):
        how += f" Hatched: ran another workload, since {workload} would take it too long; ≈ compares across the two."
    return finish(figure, results, workload, records, _finding(records), how)


def _finding(records: list[Record]) -> str:
    """The last stage against the first, or the best of what there is."""
    own = [r for r in records if r.stage not in PEERS]
    if len(own) < 2:
        best = max(records, key=lambda r: r.output_tokens_per_s or 0)
        return f"{title(best.stage)}: {rate(best.output_tokens_per_s)} output tokens per second"
    first, last = own[0], own[-1]
    best = max(own, key=lambda r: r.output_tokens_per_s or 0)
    gain = (best.output_tokens_per_s or 0) / (first.output_tokens_per_s or 1)
    if best is first:
        return f"No stage is faster than {title(first.stage)} here ({title(last.stage)} is last)"
    about = "" if first.workload == best.workload else "about "
    return f"{title(best.stage)} generates {about}{times(gain)} as many tokens per second as {title(first.stage)}"
