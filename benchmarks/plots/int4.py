"""How much faster a 4-bit layer is than a 16-bit one, by the number of rows, and where that ends."""

from __future__ import annotations

from statistics import mean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.style import INK, SOFT

COLORS = {"qkv": "#332288", "o": "#117733", "gate_up": "#CC6677", "down": "#DDAA33"}


def draw(results: dict[str, Any], hardware: str) -> Figure:
    """Speed of `int4` over `bf16`, one line a shape, against rows."""
    records = results["records"]
    figure, axes = plt.subplots(figsize=(11, 6.5))
    for shape in dict.fromkeys(r["shape"] for r in records):
        color = COLORS.get(shape, SOFT)
        line = [r for r in records if r["shape"] == shape and r["layer"] == "int4"]
        label = f"{shape} {line[0]['inputs']} → {line[0]['outputs']}"
        axes.plot([r["rows"] for r in line], [r["speedup"] for r in line], "o-", color=color, label=label)
    packed = [r for r in records if r["layer"] == "bf16 packed"]
    if packed:
        rows = sorted({r["rows"] for r in packed})
        means = [mean([r["speedup"] for r in packed if r["rows"] == n]) for n in rows]
        axes.plot(rows, means, "s--", color=SOFT, label="bf16 packed by oneDNN, mean of the shapes")
    rows = sorted({r["rows"] for r in records})
    axes.axhline(1.0, color=INK, linewidth=1.5)
    axes.set(xscale="log", xticks=rows, xlabel="rows (tokens of one step)", ylabel="times as fast as bf16", ylim=0)
    axes.set_xticklabels([str(n) for n in rows])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.set_title(f"{hardware} · groups of {results['config']['group_size']}, bf16 activations", loc="left",
                   fontsize=12, color=SOFT)  # fmt: skip
    figure.suptitle(_finding(records), x=0.02, ha="left", fontsize=16, fontweight="bold")
    figure.tight_layout()
    return figure


def _finding(records: list[dict[str, Any]]) -> str:
    int4 = [r for r in records if r["layer"] == "int4"]
    one = [r["speedup"] for r in int4 if r["rows"] == min(r["rows"] for r in int4)]
    rows = sorted({r["rows"] for r in int4})
    slower = [n for n in rows if mean([r["speedup"] for r in int4 if r["rows"] == n]) < 1]
    end = f"on average slower from {slower[0]} rows on" if slower else f"faster up to {rows[-1]} rows"
    return f"4-bit layers: {min(one):.1f} to {max(one):.1f} times bf16 at {rows[0]} row, {end}"
