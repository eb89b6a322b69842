"""A workload's sweep over prompt lengths: what grows, how fast, and where a stage runs out of memory."""

import math

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.compare import Results
from benchmarks.failure import OUT_OF_MEMORY
from benchmarks.peers import PEERS
from benchmarks.plots.bars import Value, Write, finish, note_on_execution, runs_of, times
from benchmarks.record import Record
from benchmarks.style import WIDTH, color, title
from benchmarks.table import seconds, size
from benchmarks.workloads import find, find_size

Line = list[tuple[int, Record]]  # the records of one contestant with their prompt lengths, the shortest first


PANELS: tuple[tuple[str, Value, Write], ...] = (
    ("time in attention", lambda r: None if r.attention_is_impossible else r.attention_time_s, seconds),
    ("time to first token", lambda r: r.ttft_s["p50"] if r.ttft_s else None, seconds),
    ("activations at their peak", lambda r: r.peak_activation_bytes, size),
)
APART = 0.075  # between labels, and between marks: of the panel's height


def by_length(results: Results, workload: str) -> plt.Figure | None:
    """None unless the workload is probed and two lengths or more have figures."""
    if not find(workload).probed:
        return None
    lines = _lines(results, workload)
    if len({length for line in lines.values() for length, record in line if record.ok}) < 2:
        return None
    figure, axes = plt.subplots(1, len(PANELS), figsize=(WIDTH, 4.8))
    for axis, (name, value, write) in zip(axes, PANELS, strict=True):
        _panel(axis, lines, value, write)
        axis.set_title(name, loc="left")
    axes[0].set_xlabel("tokens of the prompt", loc="left")
    records = [record for line in lines.values() for _, record in line]
    done = [record for record in records if record.ok]
    spread = max(1 - min(runs) / max(runs) for r in done if (runs := r.output_tokens_per_s_repeats or [1.0]))
    how = f"One request, both axes logarithmic; {runs_of(done)}"
    how += f" (runs of one length differ by up to {spread:.0%}). " if spread else ". "
    how += "Time in attention: of a run of its own, prompt and output"
    how += "; gaps between launches count: short prompts show the host, not the kernel. " if _on_gpu(results) else ". "
    how += "Activations: the peak over weights and KV cache."
    if unknown := dict.fromkeys(r.stage for r in done if r.attention_time_s is None or not r.peak_activation_bytes):
        how += f" Steps replayed from CUDA graphs ({', '.join(unknown)}) show neither." if _on_gpu(results) else ""
    how += note_on_execution(results, done)
    for record in done:
        if record.attention_is_impossible:
            how += f" Left out: {record.stage}'s attention at {_length(results, record):,}, longer than its request."
    if failed := [record for record in records if not record.ok]:
        memory = all(OUT_OF_MEMORY in (record.error or "") for record in failed)
        how += f" ×: the stage {'ran out of memory' if memory else 'failed'} at this length."
    return finish(figure, results, workload, records, _finding(lines), how)


def _on_gpu(results: Results) -> bool:
    return str(results.config["device"]).startswith("cuda")


def _length(results: Results, record: Record) -> int:
    size = find_size(record.workload, record.variant, results.config["preset"])
    return len(size.requests(vocab_size=1)[0].prompt)


def _lines(results: Results, workload: str) -> dict[str, Line]:
    """In the order of the table."""
    lines: dict[str, Line] = {stage: [] for stage in results.config["contestants"]}
    for record in results.records + results.sweeps:
        if record.workload == workload:
            lines.setdefault(record.stage, []).append((_length(results, record), record))
    return {stage: sorted(line, key=lambda point: point[0]) for stage, line in lines.items() if line}


def _panel(axis: plt.Axes, lines: dict[str, Line], value: Value, write: Write) -> None:
    points = {stage: [(n, y) for n, r in line if r.ok and (y := value(r) or 0) > 0] for stage, line in lines.items()}
    failed = {stage: fails for stage, line in lines.items() if (fails := [n for n, r in line if not r.ok])}
    everything = [y for line in points.values() for _, y in line] or [1.0]
    lengths = sorted({length for line in lines.values() for length, _ in line})
    _scale(axis, lengths, min(everything), max(everything), len(failed), write)
    panel = axis.transScale + axis.transLimits  # from values to shares of the panel
    for stage, line in points.items():
        if line:
            axis.plot(*zip(*line, strict=True), color=color(stage), linewidth=3, marker="o", markersize=7)
    for row, (stage, fails) in enumerate(failed.items()):
        mark = float(panel.inverted().transform((0, 0.96 - APART * row))[1])
        axis.plot(fails, [mark] * len(fails), "X", markersize=10, color=color(stage), zorder=4)
        _label(axis, fails[-1], mark, f"{stage} failed", stage)
        done = [point for point in points[stage] if point[0] < fails[0]]
        if done:
            axis.plot([done[-1][0], fails[0]], [done[-1][1], mark], ":", color=color(stage), linewidth=1.5)
    below = math.inf
    for stage, (length, end) in sorted(((s, line[-1]) for s, line in points.items() if line), key=lambda x: -x[1][1]):
        text = f"{'' if stage in PEERS else stage} {write(end)}".strip()
        if length == lengths[-1]:
            below = min(float(panel.transform((length, end))[1]), below - APART)
            _label(axis, length, float(panel.inverted().transform((0, below))[1]), text, stage)
        elif stage not in failed:  # it was not asked for more
            _label(axis, length, end, text, stage)


def _scale(axis: plt.Axes, lengths: list[int], low: float, high: float, rows: int, write: Write) -> None:
    """Both axes, with room on the right for labels and on top for a row of marks for each stage that failed."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.6)
    ticks = [2 ** round(math.log2(length)) for length in lengths][:: -2 if len(lengths) > 5 else -1]
    axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    bottom, top = 0.05, 0.94 - (APART * rows + 0.04 if rows else 0.0)
    unit = math.log(max(high / low, 4.0)) / (top - bottom)  # the logarithm's range over the whole height
    axis.set(yscale="log", ylim=(low * math.exp(-bottom * unit), low * math.exp((1 - bottom) * unit)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if unit < math.log(300) else (1.0,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda y, _: write(y).replace(".0 ", " ") if y <= 2 * high else "")
    axis.tick_params(labelsize=12)
    axis.grid(axis="y", color="#E4E4E4")
    axis.set_axisbelow(True)


def _label(axis: plt.Axes, x: float, y: float, text: str, stage: str) -> None:
    axis.annotate(text, (x, y), xytext=(10, 0), textcoords="offset points", va="center", color=color(stage),
                  fontweight="bold", fontsize=12)  # fmt: skip


def _finding(lines: dict[str, Line]) -> str:
    """m4 against m3 if they are there, else the last two stages, at the longest prompt that both could do."""
    done = {s: {n: r for n, r in line if r.ok} for s, line in lines.items() if s not in PEERS}
    stages = [stage for stage, found in done.items() if found]
    if len(stages) < 2:
        return f"{title((stages or list(lines))[0])}: time and memory against the length of the prompt{_limit(lines)}"
    before, last = ("m3", "m4") if {"m3", "m4"} <= set(stages) else stages[-2:]
    both = sorted(done[last].keys() & done[before].keys())
    parts: list[str] = []
    for name, value in (("attention time", PANELS[0][1]), ("activation memory", PANELS[2][1])):
        mine, reference = (value(done[stage][both[-1]]) if both else None for stage in (last, before))
        share = mine / reference if mine and reference else 0.0
        if share:  # `0.5% of`, `19% of`, `3.2 times`
            written = times(share) if share >= 2 else f"{share:.0%} of" if share >= 0.1 else f"{share:.1%} of"
            parts.append(f"{written} the {name}")
    if not parts:
        return f"{title(last)} and {title(before)} have no length in common{_limit(lines)}"
    return f"At {both[-1]:,} tokens {title(last)} needs {' and '.join(parts)} of {title(before)}{_limit(lines)}"


def _limit(lines: dict[str, Line]) -> str:
    """Which stages fail, and from which length on."""
    groups: dict[int, list[str]] = {}
    for stage, line in lines.items():
        if fails := [length for length, record in line if not record.ok]:
            groups.setdefault(min(fails), []).append(stage)
    parts = [f"{' and '.join(names)} fail{'s' * (len(names) == 1)} at {n:,}" for n, names in sorted(groups.items())]
    return "".join(f"; {part}" for part in parts)
