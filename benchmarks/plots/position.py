"""Time of a token against its position in the sequence: does it grow?"""

from statistics import median_high

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.bars import finish, runs_of, times
from benchmarks.record import Record
from benchmarks.style import SOFT, WIDTH, color, title
from benchmarks.table import seconds

ENDS = 5  # points at each end whose median says what a token costs there
STEADY = 1.1  # times its cost at the start: less is no growth
ENOUGH = 24  # tokens between the ends of a series that can show a growth; a few after a long prompt show noise


def longest(results: Results, workload: str) -> list[Record]:
    """For each contestant its longest series, of the headline or of a sweep's point."""
    found: dict[str, list[Record]] = {}
    for record in results.records + results.sweeps:
        series = _series(record) if record.ok and record.workload == workload else []
        if len(series) >= 2 * ENDS and series[-1][0] - series[0][0] >= ENOUGH:
            found.setdefault(record.stage, []).append(record)
    return [max(own, key=lambda record: _series(record)[-1][0]) for own in found.values()]


def _series(record: Record) -> list[list[float]]:
    return record.itl_by_position or []


def _level(points: list[list[float]]) -> float:
    return median_high(seconds for _, seconds in points)


def time_by_position(results: Results, workload: str) -> plt.Figure | None:
    records = longest(results, workload)
    if not records:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 5.2))
    start, last = min(_series(r)[0][0] for r in records), max(_series(r)[-1][0] for r in records)
    top = max(g for r in records for _, g in _series(r)) * 1e3
    ends = {r.stage: _level(_series(r)[-ENDS:]) for r in records}
    records.sort(key=lambda record: ends[record.stage])
    heights = spread([max(ends[r.stage] * 1e3, top * 0.04) for r in records], top * 0.075)
    for record, height in zip(records, heights, strict=True):
        positions, gaps = zip(*_series(record), strict=True)
        axis.plot(positions, [g * 1e3 for g in gaps], color=color(record.stage), linewidth=3)
        text = f"{title(record.stage)}: {seconds(ends[record.stage])}"
        ink = SOFT if record.stage in PEERS else color(record.stage)
        axis.text(positions[-1] + (last - start) * 0.015, height, text, va="center", color=ink, fontweight="bold")
    axis.set(ylim=(0, top * 1.08), xlim=(start, start + (last - start) * 1.45))  # room for the names
    axis.set_xticks([tick for tick in axis.get_xticks() if start <= tick <= last])
    axis.set_xlabel("position of the token in the sequence (prompt included)", loc="left")
    axis.set_title("time of one token in ms (less is better)", loc="left")
    axis.grid(axis="y", color="#E4E4E4")
    how = f"One request. Each point: median over neighbouring positions of {runs_of(records)}."
    return finish(figure, results, workload, records, _finding(records), how)


def spread(heights: list[float], apart: float) -> list[float]:
    """Heights of labels, from the lowest up, moved so far apart that they do not overlap."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + apart) if placed else height)
    return placed


def _finding(records: list[Record]) -> str:
    """What a token costs at the end of the series against its start: m0 against m1 where both are there."""
    by_stage = {r.stage: r for r in records}

    def change(stage: str) -> str:
        series = _series(by_stage[stage])
        growth = _level(series[-ENDS:]) / _level(series[:ENDS])
        share = f"{times(growth)} its cost" if growth >= STEADY else "no more than"
        return f"{series[-1][0]:.0f} costs {share} at {series[0][0]:.0f}"

    if "m0" in by_stage and "m1" in by_stage:
        finding = f"Without a KV cache the token at position {change('m0')}"
        return f"{finding}; with one, the token at {change('m1')}"
    last = max([s for s in by_stage if s not in PEERS] or list(by_stage))
    return f"{title(last)}: the token at position {change(last)}"
