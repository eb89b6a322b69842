"""Output tokens per second of every stage."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.compare import Results
from benchmarks.execution import has_plain_row
from benchmarks.peers import PEERS
from benchmarks.plots.bars import bars, figure_with_rows, finish, measured, name_rows, times
from benchmarks.record import Record
from benchmarks.style import INK, color, title
from benchmarks.table import DASH, factor, rate


def throughput(results: Results, workload: str) -> Figure | None:
    records = measured(results, workload)
    if not records:
        return None
    first = records[0]
    plain = {record.stage: results.plain_of(record) for record in records}

    def label(record: Record) -> str:
        both = [one for one in (plain[record.stage], record) if one is not None]
        gains = [gain for one in both if (gain := factor(one, first)) != DASH]
        speeds = " → ".join(rate(one.output_tokens_per_s) for one in both)
        return speeds + (f"  ({' → '.join(gains)}×)" if gains else "")

    figure, (axis,) = figure_with_rows(1, len(records))
    bars(axis, records, workload, lambda r: r.output_tokens_per_s, lambda r: max(r.output_tokens_per_s_repeats), label)
    for row, record in enumerate(records):
        if (alone := plain[record.stage]) is not None:  # over the bar: what of it is execution's
            left, whole = alone.output_tokens_per_s or 0, record.output_tokens_per_s or 0
            rest = {"height": 0.62, "facecolor": "white", "edgecolor": color(record.stage), "linewidth": 1.2}
            axis.barh(row, max(0.0, whole - left), left=left, hatch="////", **rest)
        if len(runs := record.output_tokens_per_s_repeats) > 1:
            axis.plot([min(runs), max(runs)], [row, row], "|-", color=INK, linewidth=1.4, markersize=9)
    name_rows(axis, records, workload)
    axis.set_title("output tokens per second (more is better)", loc="left")
    how = "Bar: median run; line: slowest to fastest run."
    if len(records) > 1:
        how += f" In brackets: times {title(first.stage)}."
    if any(r.workload != workload for r in records):
        how += f" Hatched: ran another workload, since {workload} would take it too long; ≈ compares across the two."
    if whole := [
        r.stage for r in records if plain[r.stage] is None and has_plain_row(r.stage, results.config["device"])
    ]:
        how += f" With execution only: {', '.join(whole)}."
    if any(plain.values()):
        how += " Hatched on white: + execution (fused or compiled kernels, CUDA graphs, planning ahead)."
    return finish(figure, results, workload, records, _finding(records, plain), how)


def _finding(records: list[Record], plain: Mapping[str, Record | None]) -> str:
    """The last stage against the first, or the best of what there is. What execution adds is said apart."""
    own = [r for r in records if r.stage not in PEERS]
    best = max(own if len(own) > 1 else records, key=lambda r: r.output_tokens_per_s or 0)
    if len(own) < 2:
        return f"{title(best.stage)}: {rate(best.output_tokens_per_s)} output tokens per second"
    first, last = own[0], own[-1]
    gain = (best.output_tokens_per_s or 0) / (first.output_tokens_per_s or 1)
    if best is first:
        return f"No stage is faster than {title(first.stage)} here ({title(last.stage)} is last)"
    about = "" if first.workload == best.workload else "about "
    finding = f"{title(best.stage)} generates {about}{times(gain)} as many tokens per second as {title(first.stage)}"
    if (alone := plain[best.stage]) is not None:
        own_gain = (alone.output_tokens_per_s or 0) / (first.output_tokens_per_s or 1)
        finding += f", {about}{times(own_gain)} without execution"
    return finding
