"""The answers as pictures: what one would draw in a design interview."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots.picture import headed, save_picture
from benchmarks.style import STAGE_COLORS, WIDTH

Row = dict[str, Any]
COLORS = [STAGE_COLORS[stage] for stage in ("m7", "m5", "m1")]
LABELS = {
    "goodput": "requests/s within the objective", "ttft_p50": "median first token, s", "ttft_p99": "p99 first token, s",
    "itl_p99": "p99 between two tokens, s", "hit_rate": "prompt tokens from caches", "replicas": "replicas",
    "rate": "requests/s", "chunk": "chunk size, tokens", "ranks": "ranks", "seconds": "seconds of a step",
    "collectives": "share of all-reduces",
}  # fmt: skip
PANELS = {
    "chunk_and_batch": ("chunk", "batch", ("goodput", "ttft_p99", "itl_p99")),
    "replicas": ("rate", "objective", ("replicas", "ttft_p99", "itl_p99")),
    "apart": ("rate", "prefill", ("goodput", "ttft_p99", "itl_p99")),
    "routing": ("policy", "", ("ttft_p50", "ttft_p99", "hit_rate")),
    "ranks": ("ranks", "what", ("seconds", "collectives")),
}
"""What is drawn against what, a line for each value of what; without that, bars."""


def figure_of(name: str, rows: Sequence[Row], note: str) -> Figure:
    x, by, keys = PANELS[name]
    figure, axes = plt.subplots(1, len(keys), figsize=(WIDTH, 4.2), sharey=not by)
    for axis, key in zip(axes, keys, strict=True):
        if by:
            _lines(axis, rows, x, key, by)
        else:
            bars = axis.barh([row[x] for row in rows], [row[key] for row in rows], color=COLORS[0])
            axis.bar_label(bars, fmt="%.2g", padding=3)
            axis.set_xlabel(LABELS[key])
            axis.margins(x=0.25)
    if by:
        axes[-1].legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes[0].invert_yaxis()
    return headed(figure, _finding(name, rows), note)


def _lines(axis: Axes, rows: Sequence[Row], x: str, y: str, by: str) -> None:
    """x at even distances; y on a logarithmic axis where it spans more than a factor of 20."""
    ticks = sorted({row[x] for row in rows})
    for index, value in enumerate(dict.fromkeys(row[by] for row in rows)):
        points = [(ticks.index(row[x]), row[y]) for row in rows if row[by] == value]
        look: Any = {"color": COLORS[index % 3], "linestyle": ("-", "--", ":")[index // 3]}
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2, label=value, **look)
    axis.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axis.tick_params(axis="x", labelsize=9)
    values = [row[y] for row in rows]
    wide = y != "goodput" and max(values) > 20 * min(values) > 0
    axis.set(xlabel=LABELS[x], ylabel=LABELS[y], yscale="log" if wide else "linear")
    if not wide:
        axis.set_ylim(0, 1.06 * max(values))
    axis.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)


def _finding(name: str, rows: Sequence[Row]) -> str:
    if name == "chunk_and_batch":
        best = max(rows, key=lambda row: row["goodput"])
        size = f"chunks of {best['chunk']}, {best['batch']}"
        return f"One replica serves {best['goodput']:.1f} requests/s within the objective: {size}"
    if name == "replicas":
        return f"{rows[-1]['rate']:g} requests/s take {rows[-1]['replicas']} replicas"
    if name == "routing":
        hits = ", ".join(f"{row['policy']} {row['hit_rate']:.0%}" for row in rows)
        return f"Share of the prompt tokens that come from caches: {hits}"
    if name == "apart":
        best = {row["prefill"]: 0.0 for row in rows}
        for row in rows:
            best[row["prefill"]] = max(best[row["prefill"]], row["goodput"])
        return "Requests/s within the objective, at best: " + ", ".join(f"{how} {n:.1f}" for how, n in best.items())
    first = {row["what"]: row["seconds"] for row in reversed(rows)}
    last = {row["what"]: row["seconds"] for row in rows}
    gains = ", ".join(f"{what.split(',')[0]} {first[what] / last[what]:.1f}x" for what in last if what.endswith(" 1"))
    return f"One decode on eight ranks, over the fewest that hold the weights: {gains} as fast"


def draw(values: dict[str, Any], folder: Path) -> Path:
    """Of one answer, as its results file has it."""
    goal, device, rows = values["objective"], values["device"], values["rows"]
    name = rows[0]["answer"]
    speeds = f"{device['bytes_per_s'] / 1e12:.1f} TB/s, {device['flop_per_s'] / 1e12:.0f} TFLOP/s"
    note = f"Simulated, not measured. {speeds}, links of {device['link_bytes_per_s'] / 1e9:.0f} GB/s. "
    asked = (
        f"A 32B model on each device. Objective: first token in {goal['ttft']:g} s, {1e3 * goal['itl']:g} ms a token."
    )
    note += "Contexts of 2048 tokens." if name == "ranks" else asked
    return save_picture(folder / f"simulate-{name}.png", partial(figure_of, name, rows, note))
