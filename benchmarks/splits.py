"""How the Triton kernels cut long contexts into parts: each way on each shape, timed as a CUDA graph runs them.

What is measured here decides `DEFAULT_SPLITTING` in stages/m4_flash_attention/kernels/triton_config.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.attention import BLOCK_SIZE, COLD_BYTES, HEADS, attending, seconds_per_call
from benchmarks.environment import environment
from benchmarks.files import write_json
from common.config import parse_device, parse_dtype
from common.errors import UserError
from common.graph_inputs import MAX_PROMPTS
from common.progress import progress_bar
from stages.m4_flash_attention import select
from stages.m4_flash_attention.backends import AttentionShape
from stages.m4_flash_attention.backends.triton import TritonBackend
from stages.m4_flash_attention.kernels.triton_config import Splitting

SCHEMA = "splits-1"
BOUND = 8704
"""`max_model_len` of an engine whose graphs these steps could be: what a rule may know of the lengths."""
WAYS = {
    "decode": {
        "now": Splitting(),
        "grid 2": Splitting(decode_grid=2),
        "grid 4": Splitting(decode_grid=4),
        "grid 4, 1k": Splitting(decode_grid=4, long_part=1024),
        "grid 8": Splitting(decode_grid=8),
        "grid 8, 256": Splitting(decode_grid=8, long_part=256),
    },
    "prefill": {
        "now": Splitting(),
        "1 each": Splitting(prefill_programs=1),
        "2 each": Splitting(prefill_programs=2),
        "4 each": Splitting(prefill_programs=4),
        "4 each, 512": Splitting(prefill_programs=4, prefill_part=512),
    },
}


@dataclass(frozen=True)
class Shape:
    """`rows`: (query tokens, context) of each sequence. `captured`: as a graph has it, with room for `MAX_PROMPTS` and
    for contexts of `BOUND`; what is not captured knows its lengths."""

    label: str
    rows: tuple[tuple[int, int], ...]
    captured: bool = True

    @property
    def kind(self) -> str:
        return "decode" if self.rows[0][0] == 1 else "prefill"

    @property
    def padded(self) -> list[tuple[int, int]]:
        missing = MAX_PROMPTS - len(self.rows) if self.captured and self.kind == "prefill" else 0
        return [*self.rows, *[(0, 0)] * missing]


def _alike(sequences: int, queries: int, context: int, captured: bool = True) -> Shape:
    after = f" after {context - queries}" if queries > 1 and context > queries else ""
    label = f"{sequences} × {context if queries == 1 else queries}{after}{'' if captured else ', not captured'}"
    return Shape(label, ((queries, context),) * sequences, captured)


SHAPES = (
    Shape("1 × 8192 beside 15 × 300", ((1, 8192), *[(1, 300)] * 15)),
    Shape("1 × 8192 beside 8 × 500", ((1, 8192), *[(1, 500)] * 8)),
    Shape("1 × 8192 beside 63 × 300", ((1, 8192), *[(1, 300)] * 63)),
    *(_alike(count, 1, context) for count, context in ((1, 8192), (4, 2048), (16, 300), (16, 2048), (64, 300))),
    *(_alike(count, 1, context) for count, context in ((64, 1024), (256, 300), (256, 1024))),
    *(_alike(1, queries, 4096 + queries) for queries in (64, 200, 256, 512, 1024)),
    *(_alike(count, queries, queries) for count, queries in ((1, 64), (1, 256), (4, 64), (8, 128), (4, 1024))),
    _alike(1, 200, 4296, captured=False),
    _alike(8, 1024, 1024, captured=False),
    _alike(1, 2048, 16384, captured=False),
)
QUICK = (Shape("1 × 90 beside 1 × 3", ((1, 90), (1, 3)), captured=False), _alike(1, 5, 40, captured=False))


def run(device: str, dtype: str, json: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, write `json`."""
    target, kind = parse_device(device), parse_dtype(dtype)
    heads = HEADS[target.type]
    shape = AttentionShape(*heads, BLOCK_SIZE, kind, target)
    if reason := select.why_not("triton", shape):
        raise UserError(f"this measures the Triton kernels, and {reason}")
    records: list[dict[str, Any]] = []
    steps = QUICK if quick else SHAPES
    with torch.inference_mode(), progress_bar("splits", sum(len(WAYS[step.kind]) for step in steps)) as advance:
        for step in steps:
            for label, way in WAYS[step.kind].items():
                seconds = measure(shape, step, way, quick)
                records.append({"step": step.label, "kind": step.kind, "way": label, **asdict(way), "seconds": seconds})
                advance(1)
    results = {
        "schema": SCHEMA,
        "environment": environment(),
        "config": {"device": str(target), "dtype": str(kind).removeprefix("torch."), "heads": heads},
        "records": records,
    }
    for name in WAYS:
        print_table(name, records)
    write_json(json, results)
    return results


def measure(shape: AttentionShape, step: Shape, way: Splitting, quick: bool) -> float:
    """Seconds of one layer. Layers are visited in turn, so that no cache is warm, as in a model."""
    tokens = sum(context for _, context in step.rows)
    kv_bytes = 2 * tokens * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    layers = 2 if quick else max(2, -(-COLD_BYTES[shape.device.type] // kv_bytes))
    bound = BOUND if step.captured else 0
    call = attending(TritonBackend(shape, way), shape, step.padded, min(layers, 64), bound)
    return seconds_per_call(call, shape.device, min(layers, 64), quick)


def print_table(kind: str, records: list[dict[str, Any]]) -> None:
    """A row for each step, a column for each way: microseconds a layer, and against what there is now."""
    table = Table(title=f"{kind}: microseconds a layer")
    table.add_column("step")
    for way in WAYS[kind]:
        table.add_column(way, justify="right")
    mine = [r for r in records if r["kind"] == kind]
    for label in dict.fromkeys(r["step"] for r in mine):
        seconds = [r["seconds"] for r in mine if r["step"] == label]
        others = [f"{s * 1e6:.1f} ({s / seconds[0]:.2f})" for s in seconds[1:]]
        table.add_row(label, f"{seconds[0] * 1e6:.1f}", *others)
    Console(width=140).print(table)
