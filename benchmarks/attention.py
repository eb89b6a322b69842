"""The attention kernels alone: each backend on each shape, against the ceilings of the same machine in the same run.

Decode reads all of K and V once and is measured in bytes of K and V per second, against a copy; prefill is measured
in floating-point operations (4 x heads x head_dim for each query and key that it may see) against a matrix product.
For decode, layers are visited in turn and together exceed the caches, as in a model: a cache that is still warm from
the last call would make any kernel look good. `contiguous` is PyTorch's SDPA on K and V that lie in one piece.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import cli
from benchmarks.environment import short_hardware
from benchmarks.plots.picture import save_picture
from benchmarks.plots.roofline import roofline
from benchmarks.sheet import print_table, write_sheet
from common import SamplingParams
from common.config import parse_device, parse_dtype
from common.execution.cuda_graphs import CudaRecorder
from common.plan import Chunk, StepPlan
from common.request import Request
from common.watch.progress import progress_bar
from stages.m3_paged_kv.batch import PagedBatches
from stages.m4_flash_attention.fast import select
from stages.m4_flash_attention.fast.backends import AttentionShape

SCHEMA = "attention-1"
COLD_BYTES = {"cpu": 160 << 20, "cuda": 400 << 20}
"""K and V of all layers together take at least this much: several times the last cache."""
BLOCK_SIZE = 16
MIN_SECONDS, MAX_CALLS = 0.4, 200


@dataclass(frozen=True)
class Step:
    """`sequences` times `queries` new tokens that end a context of `context` tokens."""

    sequences: int
    queries: int
    context: int

    @property
    def kind(self) -> str:
        return "decode" if self.queries == 1 else "prefill"

    @property
    def label(self) -> str:
        if self.queries == 1:
            return f"decode {self.sequences} × {self.context}"
        offset = self.context - self.queries
        return f"prefill {self.sequences} × {self.queries}" + (f" after {offset}" if offset else "")

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the causal mask lets through."""
        return self.sequences * sum(range(self.context - self.queries + 1, self.context + 1))


HEADS = {"cpu": (9, 3, 64), "cuda": (16, 8, 128)}
"""Query heads, KV heads, head dimension: SmolLM2-135M's on a CPU, Qwen3-0.6B's on a GPU."""
STEPS = {
    "cpu": (Step(1, 1, 2048), Step(16, 1, 512), Step(64, 1, 512),
            Step(1, 512, 512), Step(1, 2048, 2048), Step(1, 256, 2048)),
    "cuda": (Step(1, 1, 8192), Step(16, 1, 2048), Step(64, 1, 1024), Step(256, 1, 1024),
             Step(8, 1024, 1024), Step(1, 4096, 4096), Step(1, 16384, 16384), Step(1, 2048, 16384)),
}  # fmt: skip
QUICK = (Step(2, 1, 40), Step(1, 24, 40))


def run(
    device: cli.Device = "auto", dtype: cli.Dtype = "bf16", path: cli.JsonFile = None, quick: cli.Quick = False,
    out_dir: cli.PictureFolder = None,
) -> dict[str, Any]:  # fmt: skip
    """Time m4's attention backends alone, shape by shape, next to the ceilings of this machine; draw a roofline."""
    path, out_dir = cli.places(path, out_dir, "attention.json")
    target, kind = parse_device(device), parse_dtype(dtype)
    heads, kv_heads, head_dim = HEADS[target.type]
    shape = AttentionShape(heads, kv_heads, head_dim, BLOCK_SIZE, kind, target)
    steps = QUICK if quick else STEPS[target.type]
    refused = {name: reason for name in select.NAMES if (reason := select.module_of(name).why_not(shape))}
    if target.type == "cuda":
        refused["naive"] = "it is for reading: on a GPU it would launch a million tiny kernels"
    names = [*(name for name in select.NAMES if name not in refused), "contiguous"]
    jobs = [(step, name) for step in steps for name in names]
    records: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar("attention", len(jobs)) as advance:
        copy, matmul = ceilings(target, kind, quick)
        for step, name in jobs:
            records.append(measure(name, shape, step, copy, matmul, quick))
            advance(1)
    config = {"device": str(target), "dtype": str(kind).removeprefix("torch."), "heads": heads, "kv_heads": kv_heads,
              "head_dim": head_dim, "block_size": BLOCK_SIZE, "refused": refused}  # fmt: skip
    top = {"copy_gb_per_s": copy / 1e9, "matmul_tflop_per_s": matmul / 1e12, **specified(target)}
    results = write_sheet(path, SCHEMA, config, records, ceilings=top)
    show(results)
    print(f"wrote {path} and {draw(results, out_dir)}", file=sys.stderr)
    return results


def draw(results: dict[str, Any], folder: Path) -> Path:
    """The picture of results, those of an earlier run too; returns its file."""
    hardware = short_hardware(results["environment"], results["config"]["device"])
    return save_picture(folder / "attention-roofline.png", lambda: roofline(results, hardware))


class Ceilings(NamedTuple):
    """copy: bytes a second, read and written; matmul: operations a second of a large product."""

    copy: float
    matmul: float


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    source = torch.ones((4 << 20) if quick else COLD_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_per_call(lambda _: target.copy_(source), device, 1, quick)
    n = 128 if quick else {"cpu": 2048, "cuda": 8192}[device.type]
    a = torch.randn(n, n, device=device).to(dtype)
    return Ceilings(copy, 2 * n**3 / seconds_per_call(lambda _: a @ a, device, 1, quick))


def specified(device: torch.device) -> dict[str, float]:
    """A GPU's memory bandwidth by its clock and bus: no kernel exceeds it, while reading alone is faster than a copy,
    half of which is writing. Nothing where PyTorch does not know them."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    clock, bus = (getattr(gpu, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))  # kHz, bits
    return {"specified_gb_per_s": 2e3 * clock * bus / 8 / 1e9} if clock and bus else {}  # two transfers a clock


def measure(name: str, shape: AttentionShape, step: Step, copy: float, matmul: float, quick: bool) -> dict[str, Any]:
    """`rate`: GB/s for decode, TFLOP/s for prefill; `share`: of the ceiling. Both None where it could not run."""
    record: dict[str, Any] = {"backend": name, "step": step.label, "kind": step.kind, **vars(step)}
    record |= dict.fromkeys(("seconds", "rate", "share", "tflop_per_s", "flop_per_byte", "error"))
    size = shape.dtype.itemsize
    kv_bytes = 2 * step.sequences * step.context * shape.num_kv_heads * shape.head_dim * size
    q_bytes = 2 * step.sequences * step.queries * shape.num_heads * shape.head_dim * size  # read q, write the result
    flop = 4 * shape.num_heads * shape.head_dim * step.pairs
    cold = -(-COLD_BYTES[shape.device.type] // kv_bytes) if step.kind == "decode" else 2
    layers = 2 if quick else max(2, cold)
    try:
        call = contiguous(shape, step, layers) if name == "contiguous" else paged(name, shape, step, layers)
        seconds = seconds_per_call(call, shape.device, layers, quick)
    except (RuntimeError, ValueError) as error:  # out of memory, a shape that a library refuses
        return record | {"error": str(error).splitlines()[0]}
    work, ceiling, unit = (kv_bytes, copy, 1e9) if step.kind == "decode" else (flop, matmul, 1e12)
    speeds = {"seconds": seconds, "rate": work / seconds / unit, "share": work / seconds / ceiling}
    return record | speeds | {"tflop_per_s": flop / seconds / 1e12, "flop_per_byte": flop / (kv_bytes + q_bytes)}


def paged(name: str, shape: AttentionShape, step: Step, layers: int) -> Callable[[int], object]:
    """`attend` of one layer, over blocks dealt in random order."""
    blocks = step.sequences * -(-step.context // shape.block_size)
    kv = _random(shape, layers, 2, blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    q = _random(shape, step.sequences * step.queries, shape.num_heads, shape.head_dim)
    request = Request("", [0] * step.context, SamplingParams(), frozenset(), seed=0, arrival_time=0.0)
    tables = torch.randperm(blocks).view(step.sequences, -1).tolist()
    chunks = [Chunk(request, step.context - step.queries, step.queries, table) for table in tables]
    batch = PagedBatches(shape.block_size)(StepPlan(chunks), shape.device)
    backend = select.choose(name, shape).backend
    backend.begin(batch)
    return lambda layer: backend.attend(q, kv[layer])


def _random(shape: AttentionShape, *sizes: int) -> torch.Tensor:
    return torch.empty(*sizes, dtype=shape.dtype, device=shape.device).normal_()


def contiguous(shape: AttentionShape, step: Step, layers: int) -> Callable[[int], object]:
    """PyTorch's SDPA with K and V laid out as it likes them best."""
    kv = _random(shape, layers, 2, step.sequences, shape.num_kv_heads, step.context, shape.head_dim)
    q = _random(shape, step.sequences, shape.num_heads, step.queries, shape.head_dim)
    options: dict[str, Any] = {"enable_gqa": shape.group > 1}
    if step.queries == step.context:
        options["is_causal"] = True
    elif step.queries > 1:
        rows = torch.arange(step.context - step.queries, step.context, device=shape.device)[:, None]
        options["attn_mask"] = torch.arange(step.context, device=shape.device) <= rows
    return lambda layer: scaled_dot_product_attention(q, kv[layer, 0], kv[layer, 1], **options)


def seconds_per_call(call: Callable[[int], object], device: torch.device, layers: int, quick: bool) -> float:
    """The median over rounds through the layers; on a GPU a round is one CUDA graph, so launches cost nothing."""
    call(0)  # compiles
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def one_round() -> None:
        for layer in range(layers):
            call(layer)

    play = CudaRecorder()(one_round).replay if device.type == "cuda" else one_round
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < MIN_SECONDS and len(times) * layers < MAX_CALLS):
        synchronize()
        start = time.perf_counter()
        play()
        synchronize()
        times.append((time.perf_counter() - start) / layers)
        if quick or time.perf_counter() - began > 10 * MIN_SECONDS:
            break
    return sorted(times)[len(times) // 2]


def cells(record: dict[str, Any]) -> list[str]:
    """Time, rate and share of the ceiling; of a backend that could not run, why."""
    if record["seconds"] is None:
        return ["–", record["error"] or "–", "–"]
    unit = "GB/s" if record["kind"] == "decode" else "TFLOP/s"
    return [f"{record['seconds'] * 1e3:.3f} ms", f"{record['rate']:.3g} {unit}", f"{record['share']:.0%}"]


def show(results: dict[str, Any]) -> None:
    top, config, records = results["ceilings"], results["config"], results["records"]
    steps = [record["step"] for record in records]
    named = [step if step != before else "" for step, before in zip(steps, ["", *steps], strict=False)]
    print_table(
        f"attention, {config['heads']}/{config['kv_heads']} heads of {config['head_dim']}, {config['dtype']}",
        ("step", "backend", "time", "rate", "of ceiling"),
        [(step, record["backend"], *cells(record)) for step, record in zip(named, records, strict=True)],
        words=2,
        caption=f"ceilings in this run: copy {top['copy_gb_per_s']:.0f} GB/s, "
        f"matrix product {top['matmul_tflop_per_s']:.3g} TFLOP/s",
    )
    for name, reason in config["refused"].items():
        print(f"not {name}: {reason}")
