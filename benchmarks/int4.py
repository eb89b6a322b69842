"""The 4-bit linear layers alone: each of a model's shapes at 1 to 64 rows, against a 16-bit product in the same run.

A row is a token of the step. Copies of a layer are visited in turn and together exceed the caches, as in a model. The
ceiling is the time to read the 4-bit weight at the speed of a copy measured in the same run. On a GPU our kernels for
few tokens start while the previous one still runs, as in the engine (`int4`); `int4 in order` is without that.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot as plt

from benchmarks import cli
from benchmarks.attention import COLD_BYTES, ceilings, seconds_per_call
from benchmarks.environment import short_hardware
from benchmarks.plots.picture import save_picture
from benchmarks.sheet import print_table, write_sheet
from benchmarks.style import INK, SOFT
from common.config import parse_device
from common.execution.choose import choose_linear
from common.models.linear import Linear, PackedLinear, Projection
from common.watch.progress import progress_bar
from stages.m7_gptq.checkpoint.baselines import round_to_nearest
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.fast.triton_int4 import TritonInt4Linear
from stages.m7_gptq.linear import quantized_linear
from stages.m7_gptq.settings import Settings

SHAPES = {
    "cpu": {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)},
    "cuda": {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)},
}
"""Inputs and outputs: SmolLM2-135M's on a CPU, Qwen3-0.6B's on a GPU."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
GROUP = {"cpu": 64, "cuda": 128}
QUICK_SHAPES = {"small": (128, 64)}
COLORS = {"qkv": "#332288", "o": "#117733", "gate_up": "#CC6677", "down": "#DDAA33"}
BF16 = torch.bfloat16
SCHEMA = "int4-3"


def run(
    device: cli.Device = "auto", path: cli.JsonFile = None, quick: cli.Quick = False, out_dir: cli.PictureFolder = None
) -> dict[str, Any]:
    """Time m7's 4-bit layers alone, at 1 to 64 rows, next to 16-bit products and the speed of memory."""
    path, out_dir = cli.places(path, out_dir, "int4.json")
    target = parse_device(device)
    group = 32 if quick else GROUP[target.type]
    shapes = QUICK_SHAPES if quick else SHAPES[target.type]
    rows = ROWS[:2] if quick else ROWS
    records: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar("int4", len(shapes)) as advance:
        copy = ceilings(target, BF16, quick).copy
        for name, shape in shapes.items():
            records += measure(name, shape, rows, group, target, copy, quick)
            advance(1, name)
    config = {"device": str(target), "group_size": group, "rows": list(rows)}
    results = write_sheet(path, SCHEMA, config, records, ceilings={"copy_gb_per_s": copy / 1e9})
    show(results)
    hardware = short_hardware(results["environment"], target.type)
    picture = save_picture(out_dir / "int4.png", lambda: draw(results, hardware))
    print(f"wrote {path} and {picture}", file=sys.stderr)
    return results


def measure(
    name: str, shape: tuple[int, int], rows: tuple[int, ...], group: int, device: torch.device, copy: float,
    quick: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every kind of layer of one shape at every number of rows.

    layer: `int4`, `int4 in order`, `bf16` (F.linear) or `bf16 packed` (oneDNN's layout). gb_per_s: of its weight's
    bytes. speedup: over `bf16` at the same shape and rows; share: of the ceiling, the time to read the 4-bit weight.
    """
    inputs, outputs = shape
    records: list[dict[str, Any]] = []
    plain: dict[int, float] = {}
    floor = inputs * outputs / 2 / copy
    for kind, make in kinds(shape, group, device):
        first = make()
        size = first.weights_bytes()
        count = 2 if quick else max(2, -(-COLD_BYTES[device.type] // size))
        layers = [first, *(make() for _ in range(count - 1))]
        for n in rows:
            x = torch.randn(n, inputs, device=device).to(BF16)
            seconds = seconds_per_call(lambda i, layers=layers, x=x: layers[i](x), device, count, quick)
            plain.setdefault(n, seconds)
            what = {"shape": name, "inputs": inputs, "outputs": outputs, "rows": n, "layer": kind, "seconds": seconds}
            speeds = {"gb_per_s": size / seconds / 1e9, "speedup": plain[n] / seconds, "share": floor / seconds}
            records.append(what | speeds)
    return records


def kinds(shape: tuple[int, int], group: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Projection]]]:
    """What is compared; `bf16` comes first, the others are measured against it."""
    weight = torch.randn(shape[1], shape[0], device=device).mul_(shape[0] ** -0.5)
    yield "bf16", lambda: Linear(weight.to(BF16))  # F.linear: cuBLAS on a GPU
    if isinstance(choose_linear(weight.to(BF16)), PackedLinear):
        yield "bf16 packed", lambda: choose_linear(weight.to(BF16))
    rounded = round_to_nearest(weight, Settings(group_size=group, search=False))
    layer = quantized_linear(rounded, device, Int4Layers(BF16, device))
    yield "int4", lambda: quantized_linear(rounded, device, Int4Layers(BF16, device))
    if isinstance(layer, TritonInt4Linear):
        yield "int4 in order", lambda: TritonInt4Linear(rounded, BF16, device, pdl=False)


def show(results: dict[str, Any]) -> None:
    top, config = results["ceilings"]["copy_gb_per_s"], results["config"]
    rows: list[Sequence[str]] = []
    for r in sorted(results["records"], key=lambda r: (r["inputs"] * r["outputs"], r["shape"], r["rows"])):
        speeds = f"{r['seconds'] * 1e6:.1f} µs", f"{r['gb_per_s']:.0f}", f"{r['speedup']:.2f}", f"{r['share']:.0%}"
        rows.append((f"{r['shape']} {r['inputs']} → {r['outputs']}", str(r["rows"]), r["layer"], *speeds))
    print_table(
        f"4-bit linear layers, groups of {config['group_size']}, {config['device']}",
        ("shape", "rows", "layer", "time", "GB/s", "× bf16", "of ceiling"),
        rows,
        caption=f"copy in this run: {top:.0f} GB/s; 'of ceiling': time to read the 4-bit weight at that speed",
    )


def draw(results: dict[str, Any], hardware: str) -> plt.Figure:
    """Speed of `int4` over `bf16`, one line a shape, against rows."""
    records = results["records"]
    rows = sorted({r["rows"] for r in records})
    figure, axes = plt.subplots(figsize=(11, 6.5))
    for shape in dict.fromkeys(r["shape"] for r in records):
        color = COLORS.get(shape, SOFT)
        line = [r for r in records if r["shape"] == shape and r["layer"] == "int4"]
        label = f"{shape} {line[0]['inputs']} → {line[0]['outputs']}"
        axes.plot([r["rows"] for r in line], [r["speedup"] for r in line], "o-", color=color, label=label)
    if packed := [r for r in records if r["layer"] == "bf16 packed"]:
        means = [mean([r["speedup"] for r in packed if r["rows"] == n]) for n in rows]
        axes.plot(rows, means, "s--", color=SOFT, label="bf16 packed by oneDNN, mean of the shapes")
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
