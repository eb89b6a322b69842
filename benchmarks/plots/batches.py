"""Tokens a second against the batch: stages, other engines' kept figures, and what reading alone would allow."""

from typing import Any

from matplotlib import pyplot as plt

from benchmarks.environment import ROOT
from benchmarks.report.peers import read_peers
from benchmarks.style import INK, SOFT, WIDTH, color

MARKS = {"vllm": "v", "mini-sglang": "s", "nano-vllm": "^"}
GREEDY = "greedy"


def batches_figure(results: dict[str, Any], hardware: str) -> plt.Figure:
    """Tokens a second of one request, so that a line that falls shows what each request loses; both axes logarithmic.
    Peers: only where they were measured on this GPU."""
    records = [r for r in results["records"] if r["batch"].isdigit()]
    batches = sorted({int(r["batch"]) for r in records})
    figure, axes = plt.subplots(figsize=(WIDTH, 6.5))
    limits = [results["limits"][str(batch)] / batch for batch in batches]
    axes.plot(batches, limits, color=INK, linewidth=2.5, label="reading at the rate of a copy")
    for stage in dict.fromkeys(r["stage"] for r in records):
        for way in dict.fromkeys(r["sampling"] for r in records):
            line = sorted((int(r["batch"]), r["output_tokens_per_s"]) for r in records
                          if (r["stage"], r["sampling"]) == (stage, way))  # fmt: skip
            look = {"marker": "o", "markersize": 5} if way == GREEDY else {"linestyle": ":" if way == "top_p" else "--"}
            axes.plot(*zip(*((n, v / n) for n, v in line), strict=True), color=color(stage), linewidth=2,
                      label=f"{stage}, {_sampling(results, way)}", **look)  # fmt: skip
    for peer, points in _peers(results["environment"]).items():
        axes.plot([n for n, _ in points], [v / n for n, v in points], MARKS[peer.split(",")[0]], color=SOFT,
                  markersize=9, markerfacecolor="none", markeredgewidth=1.8, label=peer)  # fmt: skip
    axes.set(xscale="log", yscale="log", xticks=batches, xlabel="requests at once")
    axes.set_xticklabels([str(n) for n in batches])
    axes.set_ylabel("output tokens/s of one request")
    low, high = axes.get_ylim()
    ticks = [n * 10**power for power in range(6) for n in (1, 2, 5) if low < n * 10**power < high]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    config = results["config"]
    axes.set_title(f"{hardware} · {config['model']}, {config['dtype']}, prompts included", loc="left", fontsize=12,
                   color=SOFT, pad=12)  # fmt: skip
    figure.suptitle(_finding(records), x=0.02, ha="left", fontsize=16, fontweight="bold")
    figure.tight_layout()
    return figure


def _sampling(results: dict[str, Any], way: str) -> str:
    params: dict[str, float] = results["samplings"][way]
    return GREEDY if way == GREEDY else ", ".join(f"{name} {value}" for name, value in params.items())


def _peers(environment: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The `decode` figures of the engines that ran on this kind of GPU, greedy where they have such."""
    peers = read_peers(ROOT / "reports/peers", environment["hardware"]["gpu"])
    found: dict[str, list[tuple[int, float]]] = {}
    for peer in MARKS if peers else ():
        own = [r for r in peers.values["results"] if r["workload"] == "decode" and r["engine"] == peer]
        least = min((r["temperature"] for r in own), default=0)
        points = [(r["batch"], r["output_tokens_per_s"]) for r in own if r["temperature"] == least]
        found[f"{peer}, {GREEDY if least == 0 else f'temperature {least}'}"] = sorted(points)
    return found


def _finding(records: list[dict[str, Any]]) -> str:
    first = records[0]["stage"]
    shares = [r["of_reading"] for r in records if (r["stage"], r["sampling"]) == (first, GREEDY)]
    return f"{first} decodes at {min(shares):.0%} to {max(shares):.0%} of what reading allows"
