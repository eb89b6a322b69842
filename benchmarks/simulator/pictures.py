"""The answers as pictures: what one would draw in a design interview."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.plots.picture import headed, save_picture
from benchmarks.style import STAGE_COLORS, WIDTH

Row = dict[str, Any]
COLORS = [STAGE_COLORS[stage] for stage in ("m7", "m5", "m1", "m2", "m4", "m6")]


def lines(
    axis: plt.Axes, rows: Sequence[Row], x: str, y: str, by: str, name: Callable[[Any], str], scale: float = 1
) -> None:
    """One line for each value of `by`; x at even distances."""
    ticks = sorted({row[x] for row in rows})
    for color, value in zip(COLORS, dict.fromkeys(row[by] for row in rows), strict=False):
        points = [(ticks.index(row[x]), scale * row[y]) for row in rows if row[by] == value]
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2, color=color, label=name(value))
    axis.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axis.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)


def _chunks(rows: Sequence[Row], note: str) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6))
    lines(left, rows, "chunk", "goodput", "batch", lambda batch: f"up to {batch} at once")
    lines(right, rows, "chunk", "itl_p99", "batch", str, 1e3)
    left.set(xlabel="chunk size, tokens", ylabel="requests/s within the objective", ylim=(0, None))
    right.set(xlabel="chunk size, tokens", ylabel="p99 between two tokens, ms", ylim=(0, None))
    left.legend(frameon=False, fontsize=11)
    best = max(rows, key=lambda row: row["goodput"])
    finding = f"One replica serves at most {best['goodput']:.1f} requests/s well: chunks of {best['chunk']}, "
    return headed(figure, f"{finding}{best['batch']} at once", note, "Each point: the best of all rates tried.")


def _replicas(rows: Sequence[Row], note: str) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6))
    axis.plot([r["rate"] for r in rows], [r["replicas"] for r in rows], marker="o", linewidth=2, color=COLORS[0])
    for row in rows:
        axis.annotate(f" {row['replicas']}", (row["rate"], row["replicas"]), va="top")
    axis.set(xlabel="requests/s", ylabel="replicas", ylim=(0, None))
    most = rows[-1]
    return headed(figure, f"{most['rate']:g} requests/s take {most['replicas']} replicas", note)


def _routing(rows: Sequence[Row], note: str) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.4), sharey=True)
    panels = (
        ("ttft_p50", "median first token, s", 1),
        ("ttft_p99", "p99 first token, s", 1),
        ("hit_rate", "hit rate, %", 100),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        bars = axis.barh([row["policy"] for row in rows], [scale * row[key] for row in rows], color=COLORS[0])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    best, other = rows[-1], rows[-2]
    finding = f"{best['policy']}: {best['hit_rate']:.0%} of prompt tokens from caches, {other['policy']} {other['hit_rate']:.0%}"
    return headed(figure, finding, note)


def _apart(rows: Sequence[Row], note: str) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 4.2))
    panels = (
        ("goodput", "requests/s within the objective", 1),
        ("ttft_p99", "p99 first token, s", 1),
        ("itl_p99", "p99 between two tokens, ms", 1e3),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        lines(axis, rows, "rate", key, "prefill", lambda n: f"{n} of 8 prefill" if n else "all 8 chunked", scale)
        axis.set(xlabel="requests/s offered", ylabel=label)
        axis.set_yscale("log" if key == "ttft_p99" else "linear")
    axes[0].legend(frameon=False, fontsize=11)
    best = {n: max(r["goodput"] for r in rows if r["prefill"] == n) for n in dict.fromkeys(r["prefill"] for r in rows)}
    split = max((n for n in best if n), key=lambda n: best[n])
    finding = f"8 devices, chunked prefill on all: {best[0]:.1f} requests/s within the objective; {split} for prefill "
    return headed(figure, f"{finding}and {8 - split} for decode: {best[split]:.1f}", note)


def _ranks(rows: Sequence[Row], note: str) -> plt.Figure:
    kinds = list(dict.fromkeys(row["step"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 4.2))
    for axis, kind in zip(axes, kinds, strict=True):
        own = [row for row in rows if row["step"] == kind and row["fits"]]
        lines(axis, own, "ranks", "seconds", "model", str, 1e3)
        axis.set_title(kind)
        axis.set(xlabel="ranks", ylabel="ms" if kind == kinds[0] else "", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=11)
    one = {(r["model"], r["ranks"]): r for r in rows if r["step"] == kinds[0]}
    gains = ", ".join(
        f"{m} {one[m, 1]['seconds'] / one[m, 8]['seconds']:.1f}x" for m in dict.fromkeys(r["model"] for r in rows)
    )
    how = "Contexts of 2048 tokens; a step of one decode, of 32 and 128, and of one prompt. No point: does not fit."
    return headed(figure, f"Eight ranks speed up one decode: {gains}", how, note)


DRAW = {"chunk_and_batch": _chunks, "replicas": _replicas, "routing": _routing, "apart": _apart, "ranks": _ranks}


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    o, device = found["objective"], found["device"]
    note = (
        f"Simulated, not measured: {device['bytes_per_s'] / 1e12:.1f} TB/s, {device['flop_per_s'] / 1e12:.0f} TFLOP/s, "
    )
    note += f"links of {device['link_bytes_per_s'] / 1e9:.0f} GB/s. "
    goal = f"Objective: first token in {o['ttft']:g} s, {1e3 * o['itl']:g} ms between tokens on average."
    drawn: list[Path] = []
    for name, look in DRAW.items():
        text = note if name == "ranks" else f"A 32B model, one on each device. {note}{goal}"
        drawn.append(save_picture(folder / f"simulate-{name}.png", partial(look, found["answers"][name], text)))
    return drawn
