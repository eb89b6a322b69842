"""The 4-bit linear layers alone: each of a model's shapes at 1 to 64 rows, beside a 16-bit product in the same run.

A row is a token of the step. Copies of a layer are visited in turn and together exceed the caches, as in a model. The
ceiling is the time to read the 4-bit weight at the speed of a copy measured in the same run: no kernel can be faster
while it reads the weight from memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.attention import COLD_BYTES, ceilings, seconds_per_call
from benchmarks.environment import environment, short_hardware
from benchmarks.files import write_atomically, write_json
from common.config import parse_device
from common.models.linear import PackedLinear, Projection, make_linear
from common.models.packed import QuantizedWeight
from common.options import require
from common.progress import progress_bar
from stages.m7_gptq.cpu_linear import Scratch
from stages.m7_gptq.grid import round_to_nearest
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
BF16 = torch.bfloat16


@dataclass
class Measurement:
    """layer: `int4`, `bf16` (F.linear) or `bf16 packed` (oneDNN's layout). gb_per_s: of its weight's bytes.
    speedup: over `bf16` at the same shape and rows; share: of the ceiling, the time to read the 4-bit weight."""

    shape: str
    inputs: int
    outputs: int
    rows: int
    layer: str
    seconds: float
    gb_per_s: float
    speedup: float
    share: float


def run(
    device: str = "auto",
    json: Path | None = None,
    quick: bool = False,
    out_dir: Path = Path("reports/local"),
    group: int | None = None,
) -> dict[str, Any]:
    """Measure, print a table, write `int4.json` (or `json`) and `int4.png` in `out_dir`."""
    from benchmarks.plots.int4 import draw, save

    target = parse_device(device)
    group = group or (32 if quick else GROUP[target.type])
    shapes = QUICK_SHAPES if quick else SHAPES[target.type]
    rows = ROWS[:2] if quick else ROWS
    measured: list[Measurement] = []
    with torch.inference_mode(), progress_bar("int4", len(shapes)) as advance:
        copy, _ = ceilings(target, BF16, quick)
        for name, shape in shapes.items():
            measured += measure(name, shape, rows, group, target, copy, quick)
            advance(1)
    found = environment()
    results = {
        "schema": "int4-1",
        "environment": found,
        "config": {"device": str(target), "group_size": group},
        "ceilings": {"copy_gb_per_s": copy / 1e9},
        "records": [asdict(m) for m in measured],
    }
    print_table(results, measured)
    write_json(json or out_dir / "int4.json", results)
    figure = draw(results, short_hardware(found, target.type))
    write_atomically(out_dir / "int4.png", lambda path: save(figure, path))
    Console(stderr=True).print(f"wrote {json or out_dir / 'int4.json'} and {out_dir / 'int4.png'}", highlight=False)
    return results


def measure(
    name: str, shape: tuple[int, int], rows: tuple[int, ...], group: int, device: torch.device, copy: float,
    quick: bool,
) -> list[Measurement]:  # fmt: skip
    """Every kind of layer of one shape at every number of rows."""
    inputs, outputs = shape
    result: list[Measurement] = []
    plain: dict[int, float] = {}
    floor = inputs * outputs / 2 / copy
    for kind, make in kinds(shape, group, device):
        first = make()
        size = first.weights_bytes()
        count = 2 if quick else max(2, -(-COLD_BYTES[device.type] // size))
        layers = [first, *(make() for _ in range(count - 1))]
        for n in rows:
            x = torch.randn(n, inputs, device=device).to(BF16)
            seconds = seconds_per_call(partial(_call, layers, x), device, count, quick)
            plain.setdefault(n, seconds)
            result.append(Measurement(name, inputs, outputs, n, kind, seconds, size / seconds / 1e9,
                                      plain[n] / seconds, floor / seconds))  # fmt: skip
    return result


def _call(layers: list[Projection | Plain], x: torch.Tensor, index: int) -> object:
    return layers[index](x)


def kinds(
    shape: tuple[int, int], group: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Projection | Plain]]]:
    """What is compared; `bf16` comes first, the others are measured against it."""
    weight = torch.randn(shape[1], shape[0], device=device).mul_(shape[0] ** -0.5)
    yield "bf16", lambda: Plain(weight)
    if isinstance(make_linear(weight.to(BF16)), PackedLinear):
        yield "bf16 packed", lambda: make_linear(weight.to(BF16))
    rounded = round_to_nearest(weight, Settings(group_size=group, search=False))
    scratch = Scratch()
    layer = quantized_linear(rounded, BF16, device, scratch)
    yield "int4", lambda: deepcopy(layer, {id(scratch): scratch})  # shared, as by the layers of a model


class Plain:
    """F.linear in bfloat16: cuBLAS on a GPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.to(BF16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def weights_bytes(self) -> int:
        return self.weight.nbytes


def print_table(results: dict[str, Any], measured: list[Measurement]) -> None:
    top, config = results["ceilings"]["copy_gb_per_s"], results["config"]
    table = Table(
        title=f"4-bit linear layers, groups of {config['group_size']}, {config['device']}",
        caption=f"copy in this run: {top:.0f} GB/s; 'of ceiling': time to read the 4-bit weight at that speed",
    )
    table.add_column("shape")
    for column in ("rows", "layer", "time", "GB/s", "× bf16", "of ceiling"):
        table.add_column(column, justify="right")
    for m in sorted(measured, key=lambda m: (m.inputs * m.outputs, m.shape, m.rows)):
        table.add_row(f"{m.shape} {m.inputs} → {m.outputs}", str(m.rows), m.layer, f"{m.seconds * 1e6:.1f} µs",
                      f"{m.gb_per_s:.0f}", f"{m.speedup:.2f}", f"{m.share:.0%}")  # fmt: skip
    Console().print(table)


def tune(device: str = "auto", group: int = 128) -> None:
    """Try configurations of the Triton kernels on each shape and print the best three, to set `triton_config` by."""
    target = parse_device(device)
    require(target.type == "cuda", "--tune tries the Triton kernels, which need a GPU: leave it out")
    console = Console()
    for name, (inputs, outputs) in SHAPES["cuda"].items():
        weight = torch.randn(outputs, inputs, device=target).mul_(inputs**-0.5)
        rounded = round_to_nearest(weight, Settings(group_size=group, search=False))
        for rows in (1, 2, 4, 16, 64, 512):
            timed: list[tuple[float, str]] = []
            for label, call, count in _tries(rounded, rows, target):
                try:
                    timed.append((seconds_per_call(call, target, count, True), label))
                except RuntimeError as error:  # more shared memory than there is
                    console.print(f"{label}: {str(error).splitlines()[0]}")
            for seconds, label in sorted(timed)[:3]:
                console.print(f"{name} {inputs} → {outputs}, {rows} rows: {seconds * 1e6:6.1f} µs  {label}")


def _tries(
    weight: QuantizedWeight, rows: int, device: torch.device
) -> Iterator[tuple[str, Callable[[int], object], int]]:
    """(configuration, call, copies): rows of a program and warps for few rows of x, tiles and parts for more."""
    from stages.m7_gptq.kernels.triton_gemv import gemv
    from stages.m7_gptq.kernels.triton_layout import lay_out
    from stages.m7_gptq.kernels.triton_tiles import tiles

    first = lay_out(weight, BF16, device)
    count = min(64, -(-COLD_BYTES["cuda"] // first.nbytes()))
    copies = [replace(first, words=first.words.clone()) for _ in range(count)]
    x = torch.randn(rows, weight.in_features, device=device).to(BF16)
    out = torch.empty(rows, weight.out_features, device=device, dtype=BF16)
    if rows <= 4:
        for each, warps in itertools.product((1, 2, 4, 8), (1, 2, 4)):
            c = {"ROWS": each, "WARPS": warps}
            yield f"gemv {c}", lambda i, c=c: gemv(x, copies[i], out, c), count
    if rows > 1:
        tokens = next(n for n in (16, 64, 128) if rows <= n or n == 128)
        for each, stages, parts in itertools.product((64, 128), (3, 4), (1, 2, 4, 8)):
            c = {"TOKENS": tokens, "ROWS": each, "num_warps": 4, "num_stages": stages}
            if parts == 1 or (rows <= 64 and first.blocks % parts == 0):
                yield f"tiles {c}, {parts} parts", lambda i, c=c, p=parts: tiles(x, copies[i], out, c, p), count
