"""Output tokens per second of every stage."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.compare import Results
from benchmarks.peers.published import peer_records
from benchmarks.plots.bars import (
    PALE,
    at_work,
    bars,
    figure_with_rows,
    finish,
    idle,
    measured,
    name_rows,
    notes_on_rows,
    runs_of,
    times,
    with_execution_only,
)
from benchmarks.record import Record
from benchmarks.style import INK, color, title
from benchmarks.table import DASH, factor, rate

LIKE = 0.03
"""Two speeds that differ by no more are called alike."""


def throughput(results: Results, workload: str) -> Figure | None:
    records = measured(results, workload)
    if not records:
        return None
    peers = peer_records(results, workload)
    records += peers
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
            pale = {"alpha": PALE} if idle(record) else {}
            axis.barh(row, max(0.0, whole - left), left=left, hatch="////", **rest, **pale)
        if len(runs := record.output_tokens_per_s_repeats) > 1:
            axis.plot([min(runs), max(runs)], [row, row], "|-", color=INK, linewidth=1.4, markersize=9)
    name_rows(axis, records, workload)
    axis.set_title("output tokens per second (more is better)", loc="left")
    runs = runs_of(records)
    how = f"Bar: {runs}" + ("." if runs == "one run" else "; line: slowest to fastest.")
    if len(records) > 1:
        how += f" In brackets: times {title(first.stage)}"
        how += ", ≈ where that ran another workload." if any(r.workload != first.workload for r in records) else "."
    if any(plain.values()):
        how += " Hatched: what execution adds (fused or compiled kernels, CUDA graphs, planning ahead)."
    if peers:
        how += " Grey: requests of the same kind, other draws; their line: slowest to fastest (reports/peers)."
    how += notes_on_rows(results, records, workload)
    return finish(figure, results, workload, records, _finding(results, records, plain), how)


def _finding(results: Results, records: list[Record], plain: Mapping[str, Record | None]) -> str:
    """The fastest idea alone against the first stage; what execution adds to it is said apart."""
    stages = at_work(records)
    if len(stages) < 2:
        best = (stages or records)[0]
        return f"{title(best.stage)}: {rate(best.output_tokens_per_s)} output tokens per second"
    first, *others = stages
    if others and (rivals := [r for r in records if r.stage.endswith("(greedy)")]):
        best, rival = (max(group, key=lambda r: r.output_tokens_per_s or 0.0) for group in (stages, rivals))
        gain = (best.output_tokens_per_s or 0.0) / (rival.output_tokens_per_s or 1.0)
        name = rival.stage.split("\n")[0]
        return f"{title(best.stage)} with execution generates {gain:.2f} times as many tokens per second as {name}"

    def gain(record: Record | None) -> float:
        return ((record and record.output_tokens_per_s) or 0.0) / (first.output_tokens_per_s or 1.0)

    best = max(others, key=lambda r: gain(plain[r.stage] or r))
    alone = plain[best.stage]
    about = "" if first.workload == best.workload else "about "
    ways = [with_execution_only(results, r) for r in (best, first)]
    name = title(best.stage) + (" with execution" if ways == [True, False] else "")
    if abs(gain(alone or best) - 1) <= LIKE:
        finding = f"{name} is as fast as {title(first.stage)} here"
    elif gain(alone or best) < 1:
        finding = f"No idea at work here beats {title(first.stage)}: {name} reaches {gain(alone or best):.0%}"
    else:
        finding = f"{name} generates {about}{times(gain(alone or best))} as many tokens per second as "
        finding += title(first.stage)
    return finding + (f"; with execution {about}{times(gain(best))}" if alone is not None else "")
