"""Speed beside other processes, by how long idle threads spin."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.style import INK, RC, SOFT, color, title

STYLES = {0: "o-", 2: "s--", 8: "^:"}


def draw(results: dict[str, Any], hardware: str) -> Figure:
    """Output tokens per second against the spin count, a panel for each stage, a line for each number of busy loops."""
    records, chosen = results["records"], results["config"]["spin_count"]
    counts = sorted({record["spin_count"] for record in records})
    names = list(dict.fromkeys(record["stage"] for record in records))
    with plt.rc_context(RC):
        figure, panels = plt.subplots(1, len(names), figsize=(13, 6), squeeze=False)
        for axes, stage in zip(panels[0], names, strict=True):
            for busy in sorted({record["busy"] for record in records}):
                line = [r for r in records if r["stage"] == stage and r["busy"] == busy]
                rates = {r["spin_count"]: r["tokens_per_s"] for r in line}
                heights = [rates[count] for count in counts]
                label = f"beside {busy} busy loops" if busy else "quiet machine"
                axes.plot(range(len(counts)), heights, STYLES.get(busy, "o-"), color=color(stage), label=label)
            axes.axvline(counts.index(chosen), color=INK, linewidth=1)
            axes.set_xticks(range(len(counts)), [_name(count, results["config"]["default"]) for count in counts])
            axes.set(xlabel="spin count of idle threads", ylabel="output tokens/s", ylim=0, title=title(stage))
            axes.legend(frameon=False)
        figure.suptitle(_finding(records, chosen, results["config"]["default"]), x=0.02, ha="left", fontweight="bold")
        figure.text(0.02, 0.015, f"{hardware}. The vertical line is the chosen count.", color=SOFT, fontsize=12)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _name(count: int, default: int) -> str:
    short = f"{count // 1000}k" if count else "0"
    return f"{short}\n(default)" if count == default else short


def _finding(records: list[dict[str, Any]], chosen: int, default: int) -> str:
    stages = list(dict.fromkeys(record["stage"] for record in records))
    rate = {(r["stage"], r["spin_count"], r["busy"]): r["tokens_per_s"] for r in records}
    parts: list[str] = []
    for busy in sorted({record["busy"] for record in records}):
        over = [rate[stage, chosen, busy] / rate[stage, default, busy] for stage in stages]
        parts.append(f"{f'beside {busy}' if busy else 'quiet'} {min(over):.1f} to {max(over):.1f}")
    return f"Times as fast as with the default: {', '.join(parts)}"
