"""What the KV cache reserves and what of it is used; and the whole peak."""

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.plots.bars import PALE, bars, figure_with_rows, finish, measured, name_rows, own, row_notes
from benchmarks.record import Record
from benchmarks.style import color, title
from benchmarks.table import size


def memory(results: Results, workload: str) -> plt.Figure | None:
    records = measured(results, workload)
    if not records:
        return None
    figure, (left, right) = figure_with_rows(2, len(records))
    _kv_panel(left, records, workload)
    bars(right, records, workload, _peak, lambda r: None, lambda r: size(_peak(r)))
    name_rows(left, records, workload)
    right.tick_params(axis="y", length=0)
    on_device = any(r.peak_device_memory_bytes for r in records)
    left.set_title("KV cache: peak stored, peak reserved", loc="left")
    right.set_title(f"peak memory of the {'GPU' if on_device else 'process'}", loc="left")
    how = "Solid: tokens stored; behind: reserved by running requests. Full: stored of reserved, the mean over time. "
    how += "The peak on the right includes the weights." + row_notes(results, records, workload)
    return finish(figure, results, workload, records, _finding(records), how)


def _peak(record: Record) -> float | None:
    return record.peak_device_memory_bytes or record.peak_memory_bytes


def _kv_panel(axis: plt.Axes, records: list[Record], workload: str) -> None:
    def label(record: Record) -> str:
        if not record.kv_reserved_bytes:
            return "keeps none" if record.stage == "m0" else "does not say"
        use = "" if record.kv_utilization is None else f"\n{record.kv_utilization:.0%} full on average"
        return f"{size(record.kv_used_peak_bytes)} of {size(record.kv_reserved_bytes)} reserved{use}"

    def stored(record: Record) -> float | None:
        return record.kv_used_peak_bytes if record.kv_reserved_bytes else None

    bars(axis, records, workload, stored, lambda r: r.kv_reserved_bytes, label)
    for row, record in enumerate(records):
        if record.kv_reserved_bytes:
            axis.barh(row, record.kv_reserved_bytes, height=0.62, color=color(record.stage), alpha=0.5 * PALE, zorder=0)
    axis.set_xlim(0, max([r.kv_reserved_bytes or 0 for r in records] + [1]) * 2.2)


def _finding(records: list[Record]) -> str:
    kept = {r.stage: r.kv_utilization for r in own(records) if r.kv_utilization is not None}
    if not kept:
        return "No stage here keeps a KV cache"
    worst, most = min(kept, key=lambda stage: kept[stage]), max(kept.values())
    best = next(stage for stage, use in kept.items() if use > most - 0.02)  # the first: later ones took it over
    finding = f"{title(best)} fills {kept[best]:.0%} of the KV memory that it reserves"
    return finding if kept[worst] > most - 0.02 else f"{finding}, {title(worst)} {kept[worst]:.0%}"
