"""The roofline of the attention kernels: how far each stays below what memory and arithmetic allow."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.style import INK, SOFT, WIDTH

BACKENDS = {
    "naive": ("#882255", "naive (the lesson)"),
    "torch": ("#DDAA33", "torch: gather, then SDPA"),
    "triton": ("#117733", "triton (ours)"),
    "cpu": ("#117733", "cpu (ours)"),
    "flash_attn": ("#332288", "flash_attn"),
    "contiguous": ("#8C8C8C", "SDPA, K and V in one piece"),
}
"""Colours and names."""
MARKERS = {"decode": "o", "prefill": "s"}
OWN = ("triton", "cpu")


def roofline(results: dict[str, Any], hardware: str) -> plt.Figure:
    """Operations per second against operations per byte, both axes logarithmic. One dot a backend and shape."""
    records = [r for r in results["records"] if r["tflop_per_s"]]
    copy, matmul = results["ceilings"]["copy_gb_per_s"] / 1e3, results["ceilings"]["matmul_tflop_per_s"]
    specified = results["ceilings"].get("specified_gb_per_s")  # of GPUs, since it is recorded
    memory = specified / 1e3 if specified else copy
    figure, axes = plt.subplots(figsize=(WIDTH, 7))
    intensities = [r["flop_per_byte"] for r in records]
    low, high = min(intensities) / 4, max(*intensities, matmul / memory) * 4
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(x * memory, matmul), color=INK, linewidth=2.5)
    bottom = min(r["tflop_per_s"] for r in records) / 60  # room for the names below the dots
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, matmul * 6))
    axes.annotate(f"matrix product, measured: {matmul:.3g} TFLOP/s", (high / 1.1, matmul), xytext=(0, 7),
                  textcoords="offset points", ha="right", color=INK)  # fmt: skip
    name = f"copy, measured: {copy * 1e3:,.0f} GB/s\n(reading alone can be faster)"
    if specified:
        axes.plot(x, np.minimum(x * copy, matmul), "--", color=SOFT, linewidth=1.5)
        name = f"memory, by clock and bus: {specified:,.0f} GB/s\n(dashed: a copy, {copy * 1e3:,.0f} GB/s)"
    axes.text(0.02, 0.97, name, transform=axes.transAxes, va="top", color=INK)
    backends = list(dict.fromkeys(r["backend"] for r in records))
    for record in records:
        axes.plot(record["flop_per_byte"], record["tflop_per_s"], MARKERS[record["kind"]], **_look(record["backend"]))
    _label_columns(axes, records)
    axes.set_xlabel("floating-point operations for each byte of q, K, V and output", loc="left")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for backend in backends:
        axes.plot([], [], "o", label=BACKENDS[backend][1], **_look(backend))
    axes.legend(loc="lower center", frameon=False, bbox_to_anchor=(0.42, 0.02))
    figure.suptitle(_finding(records), x=0.02, ha="left", fontsize=17, fontweight="bold")
    config = results["config"]
    axes.set_title(
        f"{hardware} · {config['heads']}/{config['kv_heads']} heads of {config['head_dim']}, {config['dtype']}\n"
        "○ decode (sequences × context)   □ prefill (sequences × prompt)",
        loc="left", fontsize=12, color=SOFT, pad=12,
    )  # fmt: skip
    figure.tight_layout()
    return figure


def _look(backend: str) -> dict[str, Any]:
    ink = BACKENDS[backend][0]
    if backend in OWN:
        return {"color": ink, "markersize": 8, "markeredgecolor": "white", "zorder": 4}
    return {"markerfacecolor": "none", "markeredgecolor": ink, "markeredgewidth": 2, "markersize": 11, "zorder": 3}


def _label_columns(axes: Any, records: list[dict[str, Any]]) -> None:
    """Name each shape once, below the lowest dot of its column; shapes of one intensity share a column."""
    columns: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        near = next((x for x in columns if abs(np.log(x / record["flop_per_byte"])) < 0.1), record["flop_per_byte"])
        columns.setdefault(near, []).append(record)
    for x, column in columns.items():
        names = list(dict.fromkeys(r["step"] for r in column))
        text = "\n".join([names[0], *(name.split(" ", 1)[1] for name in names[1:])])
        axes.annotate(text, (x, min(r["tflop_per_s"] for r in column)), xytext=(0, -12), textcoords="offset points",
                      ha="center", va="top", rotation=90, fontsize=12, color=INK, linespacing=1.3)  # fmt: skip


def _finding(records: list[dict[str, Any]]) -> str:
    """The best of our own kernels at each of the two jobs."""
    parts: list[str] = []
    for kind, ceiling in (("decode reads K and V at", "copy"), ("prefill computes at", "matrix product")):
        own = [r for r in records if kind.startswith(r["kind"]) and r["backend"] in OWN]
        if own:
            best = max(own, key=lambda r: r["share"])
            parts.append(f"{kind} {best['share']:.0%} of a {ceiling}'s speed")
    return ("Our kernels: " + ",\n".join(parts)) if parts else "Attention backends below the roofline"
