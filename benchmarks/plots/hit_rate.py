"""What a prefix cache saves, by the share of the prompt that is in it; and what looking for it costs if none is."""

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.bars import finish, runs_of, times
from benchmarks.plots.position import spread
from benchmarks.record import Record
from benchmarks.style import SOFT, WIDTH, color, title
from benchmarks.table import seconds
from benchmarks.workloads import find, find_size

Line = dict[int, Record]  # the records of one contestant, by hit rate in percent


def hit_rate(results: Results, workload: str) -> plt.Figure | None:
    """Median and p99 of the time to the first token; None unless two hit rates or more have figures."""
    lines = _lines(results, workload)
    rates = sorted({rate for line in lines.values() for rate in line})
    if len(rates) < 2:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 5.6))
    records = [record for line in lines.values() for record in line.values()]
    top = max(_ttft(record, "p99") for record in records)
    unit, word = (1.0, "s") if top >= 2 else (1e3, "ms")
    for stage, line in lines.items():
        for name, width, solid in (("p50", 3.0, 1.0), ("p99", 1.2, 0.45)):
            ys, look = [_ttft(record, name) * unit for record in line.values()], {"color": color(stage), "alpha": solid}
            axis.plot(list(line), ys, marker="o", markersize=2 + 2 * width, linewidth=width, **look)
    for at, offset, align in ((rates[0], -2, "right"), (rates[-1], 2, "left")):
        ends = [(_ttft(line[at]), stage) for stage, line in lines.items() if at in line]
        _name_ends(axis, at + offset, ends, top, unit, align)
    axis.set(ylim=(0, top * 1.08 * unit), xlim=(rates[0] - 25, rates[-1] + 48))
    axis.set_xticks(rates, [f"{rate} %" for rate in rates])
    axis.set_xlabel("share of the prompt that is in a warm cache", loc="left")
    axis.set_title(f"time to first token in {word} (less is better)", loc="left")
    axis.spines["bottom"].set_bounds(rates[0], rates[-1])
    axis.grid(axis="y", color="#E4E4E4")
    how = f"Line: median; thin line: 99th percentile; of {runs_of(records)}. "
    how += "Prompts are equally long at every hit rate."
    return finish(figure, results, workload, records, _finding(lines), how)


def _lines(results: Results, workload: str) -> dict[str, Line]:
    """In the order of the table, without those that have only one point."""
    lines: dict[str, Line] = {stage: {} for stage in results.config["contestants"]}
    for record in results.records + results.sweeps:
        if record.workload == workload and record.ok and record.ttft_s:
            rate = find_size(workload, record.variant, results.config["preset"]).hit_rate
            if rate is not None:
                lines.setdefault(record.stage, {})[rate] = record
    return {stage: dict(sorted(line.items())) for stage, line in lines.items() if len(line) > 1}


def _ttft(record: Record, name: str = "p50") -> float:
    assert record.ttft_s
    return record.ttft_s[name]


def _name_ends(axis: plt.Axes, x: float, ends: list[tuple[float, str]], top: float, unit: float, align: str) -> None:
    """Name and value of each line's end, (seconds, stage), moved up and down until they do not overlap."""
    ends.sort()
    heights, apart = [max(y, top * 0.03) for y, _ in ends], top * 0.075
    up, down = spread(heights, apart), spread([-height for height in reversed(heights)], apart)
    for (y, stage), a, b in zip(ends, up, reversed(down), strict=True):
        height = (a - b) / 2
        name = f"{title(stage)}: " if align == "left" else "" if stage in PEERS else f"{stage} "
        axis.text(x, height * unit, f"{name}{seconds(y)}", ha=align, va="center",
                  color=SOFT if stage in PEERS else color(stage), fontweight="bold", fontsize=13)  # fmt: skip


def _finding(lines: dict[str, Line]) -> str:
    """m6 against m5 if they are there, else the last two stages: at the highest hit rate, and at none."""
    own = [stage for stage in lines if stage not in PEERS]
    if len(own) < 2:
        return f"{title((own or list(lines))[0])}: time to the first token against the hit rate"
    before, last = ("m5", "m6") if {"m5", "m6"} <= set(own) else own[-2:]
    both = [rate for rate in lines[last] if rate in lines[before]]
    if not both:
        return f"{title(last)} and {title(before)} have no hit rate in common"
    here, there = (_ttft(lines[stage][both[-1]]) for stage in (last, before))
    finding = f"At {both[-1]} % hits the first token comes after {seconds(here)} with {title(last)}"
    finding += f", after {seconds(there)} with {title(before)}"
    if here * 1.05 <= there:
        finding += f" ({times(there / here)} as long)"
    if both[0] == 0:
        cost = _ttft(lines[last][0]) / _ttft(lines[before][0]) - 1
        finding += f"; without hits {last} is {abs(cost):.1%} {'later' if cost >= 0 else 'sooner'}"
    return finding


def by_turn(results: Results, workload: str) -> plt.Figure | None:
    """The median time to the first token of each turn of a chat; None where there are no turns."""
    records = [r for r in results.records if r.ok and r.workload == workload and "turn 1" in (r.ttft_by_group or {})]
    if not records or find(workload).columns != "prefix":
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 5.2))
    series = {r.stage: [found["p50"] for found in (r.ttft_by_group or {}).values()] for r in records}
    turns = max(len(ys) for ys in series.values())
    top = max(max(ys) for ys in series.values())
    unit, word = (1.0, "s") if top >= 2 else (1e3, "ms")
    ends = sorted((ys[-1], stage) for stage, ys in series.items())
    for _, stage in ends:
        values = [value * unit for value in series[stage]]
        axis.plot(range(1, len(values) + 1), values, marker="o", markersize=8, linewidth=3, color=color(stage))
    _name_ends(axis, turns * 1.03, ends, top, unit, "left")
    axis.set(ylim=(0, top * 1.1 * unit), xlim=(0.8, turns * 1.5), xticks=range(1, turns + 1))
    axis.spines["bottom"].set_bounds(1, turns)
    axis.set_xlabel("turn of the chat", loc="left")
    axis.set_title(f"time to first token in {word}, median (less is better)", loc="left")
    axis.grid(axis="y", color="#E4E4E4")
    last, first = series[ends[0][1]], series[ends[-1][1]]
    finding = f"The first token of turn {turns} comes after {seconds(last[-1])} with {title(ends[0][1])}"
    if len(series) > 1:
        finding += f", after {seconds(first[-1])} with {title(ends[-1][1])}"
    how = f"A turn's prompt is all that its chat has said so far and a new message. Of {runs_of(records)}."
    return finish(figure, results, workload, records, finding, how)
