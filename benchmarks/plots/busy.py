"""The speed of engines next to busy processes, by how long idle threads spin: what `make busy` measures."""

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.plots.picture import headed
from benchmarks.style import color, title

SCHEMA = "busy-1"
STYLES = {0: "o-", 2: "s--", 8: "^:"}


def rates_of(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    return {(r["stage"], r["busy"], r["setting"]): r["tokens_per_s"] for r in records}


def busy_figure(results: dict[str, Any], hardware: str) -> Figure:
    """Output tokens per second by setting, a panel for each stage, a line for each number of busy loops."""
    records, ours = results["records"], results["config"]["ours"]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    names = list(dict.fromkeys(record["stage"] for record in records))
    rates = rates_of(records)
    figure, panels = plt.subplots(1, len(names), figsize=(11, 5), squeeze=False)
    for axes, stage in zip(panels[0], names, strict=True):
        for busy in sorted({record["busy"] for record in records}):
            heights = [rates[stage, busy, setting] for setting in settings]
            label = f"next to {busy} busy loops" if busy else "quiet machine"
            style, apart = STYLES.get(busy, "o-"), len(settings) - 1  # ours is not a spin count more: no line to it
            axes.plot(range(apart), heights[:apart], style, color=color(stage), label=label)
            axes.plot([apart + 0.3], heights[apart:], style, color=color(stage))
        places = [*range(len(settings) - 1), len(settings) - 0.7]
        axes.set_xticks(places, [_name(each, results["config"]["default"]) for each in settings])
        axes.tick_params(axis="x", labelsize=11)
        axes.set(xlabel="spin count of idle threads", ylabel="output tokens/s", title=title(stage))
        axes.set_ylim(0, 1.35 * max(r["tokens_per_s"] for r in records if r["stage"] == stage))
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=11)
    note = "Rightmost, what the engines do: as many threads as other programs leave CPUs. Median of "
    note += f"{results['config']['rounds']} runs. {results['config']['model']} · {hardware}"
    return headed(figure, _finding(records, ours, results["config"]["default"]), note)


def _name(setting: str, default: str) -> str:
    short = setting.replace(",000", "k").replace(" + following", "\nengines")
    return f"{short}\ndefault" if setting == default else short


def _finding(records: list[dict[str, Any]], ours: str, default: str) -> str:
    stages = list(dict.fromkeys(record["stage"] for record in records))
    rate = rates_of(records)
    parts: list[str] = []
    for busy in sorted({record["busy"] for record in records}):
        over = [rate[stage, busy, ours] / rate[stage, busy, default] for stage in stages]
        span = "–".join(dict.fromkeys(f"{share:.1f}" for share in (min(over), max(over))))
        parts.append(f"{span} {f'next to {busy} loops' if busy else 'quiet'}")
    return f"Engines run at this many times the default's speed: {', '.join(parts)}"
