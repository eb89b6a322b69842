"""The 4-bit linear layers alone: each of a model's shapes at 1 to 64 rows, beside a 16-bit product in the same run.

A row is a token of the step. Copies of a layer are visited in turn and together exceed the caches, as in a model. The
ceiling is the time to read the 4-bit weight at the speed of a copy measured in the same run: no kernel can be faster
while it reads the weight from memory.

On a GPU our kernels for few tokens start while the one in front still runs, as in the engine (`int4`); what they would
be without that stands beside it (`int4 in order`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.attention import COLD_BYTES, ceilings, seconds_per_call
from benchmarks.environment import environment, short_hardware
from benchmarks.files import read_json, write_atomically, write_json
from common.config import parse_device
from common.errors import require
from common.execution.choose import choose_linear
from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models.linear import Projection
from common.models.quantized_weight import QuantizedWeight
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
BF16 = torch.bfloat16
SCHEMA = "int4-3"
GOAL = 1.5
"""Times as fast as a bf16 product at one row: what a GPU's kernel is held to on each shape."""
TUNED_ROWS = (1, 2, 4, 16, 64, 128, 256, 512)
TUNE_SECONDS = 150.0
"""Tuning stops here with what it has: compiling takes most of it."""


@dataclass
class Measurement:
    """layer: `int4`, `int4 in order`, `bf16` (F.linear) or `bf16 packed` (oneDNN's layout). gb_per_s: of its weight's
    bytes. speedup: over `bf16` at the same shape and rows; share: of the ceiling, the time to read the 4-bit weight."""

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
    resume: bool = False,
) -> dict[str, Any]:
    """Measure, print a table and the verdicts, write `int4.json` (or `json`) and `int4.png` in `out_dir`.

    The file is written after each shape. resume: shapes that it has, measured on the same machine, are not measured
    again.
    """
    from benchmarks.plots.int4 import draw, save

    target, path = parse_device(device), json or out_dir / "int4.json"
    group = group or (32 if quick else GROUP[target.type])
    shapes = QUICK_SHAPES if quick else SHAPES[target.type]
    rows = ROWS[:2] if quick else ROWS
    found = environment()
    config = {"device": str(target), "group_size": group, "rows": list(rows)}
    results: dict[str, Any] = {"schema": SCHEMA, "environment": found, "config": config}
    measured = earlier(path, results) if resume else []
    with torch.inference_mode(), progress_bar("int4", len(shapes)) as advance:
        copy, _ = ceilings(target, BF16, quick)
        results["ceilings"] = {"copy_gb_per_s": copy / 1e9}
        for name, shape in shapes.items():
            if all(m.shape != name for m in measured):
                measured += measure(name, shape, rows, group, target, copy, quick)
            results |= {"verdicts": verdicts(measured), "records": [asdict(m) for m in measured]}
            write_json(path, results)
            advance(1, name)
    print_table(results, measured)
    figure = draw(results, short_hardware(found, target.type))
    write_atomically(out_dir / "int4.png", lambda path: save(figure, path))
    Console(stderr=True).print(f"wrote {path} and {out_dir / 'int4.png'}", highlight=False)
    return results


def earlier(path: Path, results: dict[str, Any]) -> list[Measurement]:
    """What an interrupted run has left in the file; `UserError` if it measured something else, or elsewhere."""
    if not path.exists():
        return []
    old = read_json(path)
    same = (old.get("schema"), old.get("config")) == (results["schema"], results["config"])
    same = same and old.get("environment", {}).get("hardware") == results["environment"]["hardware"]
    require(same, f"{path} was measured with other settings or on another machine: leave out --resume")
    return [Measurement(**record) for record in old["records"]]


def verdicts(measured: list[Measurement]) -> list[dict[str, Any]]:
    """Of each shape: how many times as fast as bf16 at one row, whether that is the goal, and the fewest rows at which
    the advantage has ended (None: it has not)."""
    result: list[dict[str, Any]] = []
    for name in dict.fromkeys(m.shape for m in measured):
        line = sorted((m for m in measured if m.shape == name and m.layer == "int4"), key=lambda m: m.rows)
        ends = next((m.rows for m in line if m.speedup < 1), None)
        met = line[0].speedup >= GOAL
        result.append({"shape": name, "speedup": line[0].speedup, "goal": GOAL, "met": met, "ends_at_rows": ends})
    return result


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
    if isinstance(choose_linear(weight.to(BF16)), OneDnnLinear):
        yield "bf16 packed", lambda: choose_linear(weight.to(BF16))
    rounded = round_to_nearest(weight, Settings(group_size=group, search=False))
    fast = Int4Layers(BF16, device)
    layer, scratch = quantized_linear(rounded, BF16, device, fast), fast.scratch
    yield "int4", lambda: deepcopy(layer, {id(scratch): scratch})  # shared, as by the layers of a model
    if isinstance(layer, TritonInt4Linear):
        yield "int4 in order", lambda: TritonInt4Linear(rounded, BF16, device, pdl=False)


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
    console = Console()
    console.print(table)
    for v in results["verdicts"]:
        said = f"{v['shape']}: {v['speedup']:.2f} × bf16 at one row"
        if results["config"]["device"].startswith("cuda"):
            said += f", goal {v['goal']}: {'met' if v['met'] else 'not met'}"
        end = f"slower from {v['ends_at_rows']} rows on" if v["ends_at_rows"] else "faster at all rows measured"
        console.print(f"{said}; {end}", highlight=False)


def tune(
    device: str = "auto",
    json: Path | None = None,
    group: int = 128,
    resume: bool = False,
    out_dir: Path = Path("reports/local"),
) -> dict[str, Any]:
    """Try configurations of the Triton kernels on each shape and print the best three, to set `triton_int4_config` by.

    Every try is written to `int4-tune.json` (or `json`) at once; resume: those that it has are not tried again.
    """
    target, path = parse_device(device), json or out_dir / "int4-tune.json"
    require(target.type == "cuda", "--tune tries the Triton kernels, which need a GPU: leave it out")
    found = environment()
    config = {"device": str(target), "group_size": group}
    results: dict[str, Any] = {"schema": "int4-tune-1", "environment": found, "config": config, "records": []}
    if resume and path.exists():
        old = read_json(path)
        same = old.get("config") == config and old.get("environment", {}).get("hardware") == found["hardware"]
        require(same, f"{path} was measured with other settings or on another machine: leave out --resume")
        results["records"] = old["records"]
    began = time.perf_counter()
    with torch.inference_mode():
        for name, (inputs, outputs) in SHAPES["cuda"].items():
            weight = torch.randn(outputs, inputs, device=target).mul_(inputs**-0.5)
            rounded = round_to_nearest(weight, Settings(group_size=group, search=False))
            for rows in TUNED_ROWS:
                _tune_one(name, rounded, rows, target, results, path, began)
    print_best(results["records"])
    return results


def _tune_one(
    name: str, weight: QuantizedWeight, rows: int, device: torch.device, results: dict[str, Any], path: Path,
    began: float,
) -> None:  # fmt: skip
    """Every configuration of one shape at so many rows, as long as there is time."""
    records: list[dict[str, Any]] = results["records"]
    done = {r["config"] for r in records if (r["shape"], r["rows"]) == (name, rows)}
    for label, call, count in _tries(weight, rows, device):
        if time.perf_counter() - began > TUNE_SECONDS:
            return
        if label in done:
            continue
        record: dict[str, Any] = {"shape": name, "rows": rows, "config": label, "seconds": None, "error": None}
        try:
            record["seconds"] = seconds_per_call(call, device, count, True)
        except RuntimeError as error:  # more shared memory than there is
            record["error"] = str(error).splitlines()[0]
        records.append(record)
        write_json(path, results)


def print_best(records: list[dict[str, Any]]) -> None:
    """The three fastest configurations of each shape and number of rows."""
    console = Console()
    for name, rows in dict.fromkeys((r["shape"], r["rows"]) for r in records):
        tried = [r for r in records if (r["shape"], r["rows"]) == (name, rows) and r["seconds"] is not None]
        for r in sorted(tried, key=lambda r: r["seconds"])[:3]:
            line = f"{name}, {rows} rows: {r['seconds'] * 1e6:6.1f} µs  {r['config']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tries(
    weight: QuantizedWeight, rows: int, device: torch.device
) -> Iterator[tuple[str, Callable[[int], object], int]]:
    """(configuration, call, copies): rows of a program and warps for few rows of x, tiles and parts for more, and for
    many the weight written out in 16 bits for cuBLAS: where the fastest changes are `triton_int4_config`'s limits."""
    from common.execution.gpu.launch import launch_options
    from stages.m7_gptq.fast.kernels.triton_int4_dequantize import dequantize
    from stages.m7_gptq.fast.kernels.triton_int4_gemv import gemv
    from stages.m7_gptq.fast.kernels.triton_int4_layout import lay_out
    from stages.m7_gptq.fast.kernels.triton_int4_tiles import tiles

    first = lay_out(weight, BF16, device)
    count = -(-COLD_BYTES["cuda"] // first.nbytes())
    copies = [deepcopy(first) for _ in range(count)]  # scales too: what a cache holds would not be read from memory
    x = torch.randn(rows, weight.in_features, device=device).to(BF16)
    launch = launch_options(device)
    if rows <= 4:
        for each, warps in itertools.product((16, 32), (2, 4, 8, 16)):
            c = {"ROWS": each, "WARPS": warps}
            yield f"gemv {c}", lambda i, c=c: gemv(x, copies[i], launch, config=c), count
    if rows > 1:
        tokens = next(n for n in (16, 64, 128) if rows <= n or n == 128)
        for each, stages, parts in itertools.product((64, 128), (3, 4), (1, 2, 4, 8)):
            c = {"TOKENS": tokens, "ROWS": each, "num_warps": 4, "num_stages": stages}
            if parts == 1 or (rows <= 64 and first.blocks % parts == 0):
                yield f"tiles {c}, {parts} parts", lambda i, c=c, p=parts: tiles(x, copies[i], c, p), count
    if rows >= 64:
        yield "dequantised, cuBLAS", lambda i: F.linear(x, dequantize(copies[i], BF16)), count
