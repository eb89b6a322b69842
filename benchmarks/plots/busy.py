"""Speed next to busy processes, by how long idle threads spin, and with threads that follow the load."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.style import SOFT, color, title

STYLES = {0: "o-", 2: "s--", 8: "^:"}


def draw(results: dict[str, Any], hardware: str) -> Figure:
    """Output tokens per second by setting, a panel for each stage, a line for each number of busy loops."""
    records, ours = results["records"], results["config"]["ours"]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    names = list(dict.fromkeys(record["stage"] for record in records))
    figure, panels = plt.subplots(1, len(names), figsize=(13, 6), squeeze=False)
    for axes, stage in zip(panels[0], names, strict=True):
        for busy in sorted({record["busy"] for record in records}):
            line = [r for r in records if r["stage"] == stage and r["busy"] == busy]
            rates = {r["setting"]: r["tokens_per_s"] for r in line}
            heights = [rates[setting] for setting in settings]
            label = f"beside {busy} busy loops" if busy else "quiet machine"
            style, apart = STYLES.get(busy, "o-"), len(settings) - 1  # ours is not a spin count more: no line to it
            axes.plot(range(apart), heights[:apart], style, color=color(stage), label=label)
            axes.plot([apart + 0.3], heights[apart:], style, color=color(stage))
        places = [*range(len(settings) - 1), len(settings) - 0.7]
        axes.set_xticks(places, [_name(each, results["config"]["default"]) for each in settings])
        axes.tick_params(axis="x", labelsize=11)
        axes.set(xlabel="spin count of idle threads", ylabel="output tokens/s", title=title(stage))
        axes.set_ylim(0, 1.35 * max(r["tokens_per_s"] for r in records if r["stage"] == stage))
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=11)
    figure.suptitle(_finding(records, ours, results["config"]["default"]), x=0.02, ha="left", fontweight="bold")
    note = f"{hardware}. Rightmost, what the engines do: as many threads as other programs leave CPUs."
    figure.text(0.02, 0.015, note, color=SOFT, fontsize=12)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _name(setting: str, default: str) -> str:
    short = setting.replace(",000", "k").replace(" + following", "\nengines")
    return f"{short}\ndefault" if setting == default else short


def _finding(records: list[dict[str, Any]], ours: str, default: str) -> str:
    stages = list(dict.fromkeys(record["stage"] for record in records))
    rate = {(r["stage"], r["setting"], r["busy"]): r["tokens_per_s"] for r in records}
    parts: list[str] = []
    for busy in sorted({record["busy"] for record in records}):
        over = [rate[stage, ours, busy] / rate[stage, default, busy] for stage in stages]
        parts.append(f"{f'beside {busy}' if busy else 'quiet'} {min(over):.1f} to {max(over):.1f}")
    return f"Times as fast as with the default: {', '.join(parts)}"
