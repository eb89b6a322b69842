"""What each way to hold the weights costs in quality, against the bytes it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.plots.picture import save_picture
from benchmarks.style import SOFT, color


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    return save_picture(path, lambda: _bars(rows))


def _bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity over bf16 of every row, one bar each; the bytes of the quantised layers next to it."""
    reference = next(row for row in rows if row["name"] == "bf16")
    shown = [row for row in rows if row is not reference]
    figure, axis = plt.subplots(figsize=(12, 0.5 * len(shown) + 1.8))
    for y, row in enumerate(reversed(shown)):
        over = row["perplexity"] / reference["perplexity"] - 1
        axis.barh(y, over, color=color("m7") if "GPTQ" in row["name"] else "#B0B0B0", height=0.65)
        text = f"{over:+.1%}   {row['layer_bytes'] / 1e6:.0f} MB   agrees {row['agreement']:.0%}"
        axis.annotate(text, (max(over, 0), y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=12)
    axis.set_yticks(range(len(shown)), [row["name"] for row in reversed(shown)])
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlim(right=axis.get_xlim()[1] * 1.35)
    axis.set_xlabel(f"perplexity over bf16's {reference['perplexity']:.2f}")
    axis.set_title(f"What 4 bits cost (quantised layers: {reference['layer_bytes'] / 1e6:.0f} MB in bf16)", loc="left")
    return figure
