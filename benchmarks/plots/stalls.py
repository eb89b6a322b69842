"""What waits for a long prompt: requests that decode, the prompt itself, and a short one behind it."""

from collections.abc import Callable

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.bars import finish, measured, name_rows, row_notes, runs_of, times
from benchmarks.plots.latency import summary_bars
from benchmarks.recipes import LONG, SHORT
from benchmarks.record import Record, Summary
from benchmarks.style import WIDTH, title
from benchmarks.table import seconds


def group_ttft(group: str) -> Callable[[Record], Summary | None]:
    return lambda record: (record.ttft_by_group or {}).get(group)


def stalls(results: Results, workload: str) -> plt.Figure | None:
    """Three panels, a row for each stage; None unless the workload has long prompts among others."""
    records = [r for r in measured(results, workload) if group_ttft(LONG)(r)]
    if not records:
        return None
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 2.4 + 1.6 * len(records)))
    panels: tuple[tuple[str, Callable[[Record], Summary | None], tuple[str, ...]], ...] = (
        ("time between tokens of those that run", lambda r: r.itl_s, ("p99", "max")),
        ("first token of the long prompt", group_ttft(LONG), ("p99",)),
        ("first token of a short one behind", group_ttft(SHORT), ("p99",)),
    )
    for axis, (name, summary, ends) in zip(axes, panels, strict=True):
        summary_bars(axis, records, workload, summary, *ends)
        axis.set_title(name, loc="left")
        name_rows(axis, records, workload)
    how = f"Less is better. Bar: median; dot: on top the longest gap, else the 99th percentile, of {runs_of(records)}. "
    how += "Waiting in the queue counts." + row_notes(results, records, workload)
    return finish(figure, results, workload, records, _finding(records), how)


def _finding(records: list[Record]) -> str:
    """m5 against m4 if they are there, else the last two stages."""
    own = {r.stage: r for r in records if r.stage not in PEERS and r.itl_s}
    if len(own) < 2:
        record = records[-1]
        assert record.itl_s
        return f"{title(record.stage)}: decoding requests wait up to {seconds(record.itl_s['max'])} for a token"
    before, last = ("m4", "m5") if {"m4", "m5"} <= own.keys() else list(own)[-2:]
    there, here = own[before], own[last]
    finding = "While long prompts arrive, the p99 time between tokens is "
    finding += ", ".join(f"{seconds(r.itl_s['p99'])} with {title(r.stage)}" for r in (here, there) if r.itl_s)
    paid, price = group_ttft(LONG)(there), group_ttft(LONG)(here)
    factor = price["p50"] / paid["p50"] if paid and price else 1.0
    return finding + (f"; the long prompt waits {times(factor)} as long" if factor >= 1.05 else "")
