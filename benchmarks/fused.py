"""The fused kernels alone: each operation of `common.models.ops` against its definition and a copy's bandwidth.

On a GPU every time is that of one call within a CUDA graph, so launches from the host cost nothing on either side.
The calls of one graph take turns over copies of the weights that together exceed the caches, as the layers of a model
do. `fused` lets a kernel start while the previous one ends; `apart` does not. GB/s counts weights and logits, read
once; for the operations between the products, their inputs and outputs.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks.attention import COLD_BYTES, ceilings, print_best, seconds_per_call
from benchmarks.environment import environment
from benchmarks.files import write_json
from common.config import parse_device, parse_dtype
from common.errors import UserError
from common.models.config import ModelConfig
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear
from common.models.ops import Ops
from common.models.sources.random_weights import PRESETS
from common.watch.progress import progress_bar

ROWS = (1, 2, 4, 8, 16, 32, 64)
TUNED_ROWS = (1, 8, 16)
TUNE_SECONDS = 80.0
"""Tuning stops here with what it has: compiling takes most of it."""

Call = Callable[[Ops, int], object]
"""call(ops, copy): the operation, on that copy of the weights."""


@dataclass(frozen=True)
class Case:
    """One operation on `rows` tokens; `bytes` is what it has to move. `product`: weight, x, and skinny's options."""

    name: str
    rows: int
    bytes: int
    copies: int
    call: Call
    product: tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]] | None = None


@dataclass
class Measurement:
    """Seconds of one call; GB/s of the fused one, and its share of the copy's."""

    name: str
    rows: int
    fused: float
    apart: float
    plain: float
    gb_per_s: float
    share: float


def cases(config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...]) -> Iterator[Case]:
    hidden, dim, size = config.hidden_size, config.head_dim, dtype.itemsize
    num_q, num_kv = config.num_heads, config.num_kv_heads

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    norm, head_norm = RMSNorm(tensor(hidden), config.rms_norm_eps), RMSNorm(tensor(dim), config.rms_norm_eps)
    shapes = {
        "norm + qkv": ((num_q + 2 * num_kv) * dim, hidden),
        "o + residual": (hidden, num_q * dim),
        "norm + gate, up + SiLU": (2 * config.intermediate_size, hidden),
        "down + residual": (hidden, config.intermediate_size),
        "norm + head": (config.vocab_size, hidden),
    }
    for name, (outputs, width) in shapes.items():
        copies = max(2, -(-COLD_BYTES[device.type] // (outputs * width * size))) if device.type == "cuda" else 2
        weights = [tensor(outputs, width) * width**-0.5 for _ in range(copies)]
        projections = [Linear(weight) for weight in weights]
        for n in rows:
            x, residual = tensor(n, width), tensor(n, outputs)
            before: dict[str, Any] = {"norm": norm.weight, "eps": norm.eps}
            call: Call = lambda ops, i, x=x, p=projections: ops.norm_linear(x, norm, p[i])  # noqa: E731
            if "residual" in name:
                before = {"add_to": residual}
                call = lambda ops, i, x=x, r=residual, p=projections: ops.residual_linear(r, p[i], x)  # noqa: E731
            elif "SiLU" in name:
                before["gated"] = True
                call = lambda ops, i, x=x, p=projections: ops.norm_swiglu(x, norm, p[i])  # noqa: E731
            yield Case(name, n, weights[0].nbytes, copies, call, (weights, x, before))
    rotary = RotaryEmbedding(replace(config, max_position_embeddings=max(rows)), dtype, device)
    embedding = tensor(config.vocab_size, hidden)
    for n in rows:
        x, qkv, gate_up = tensor(n, hidden), tensor(n, num_q + 2 * num_kv, dim), tensor(n, 2 * config.intermediate_size)
        heads = qkv[:, : num_q + num_kv]
        positions = torch.arange(n, device=device)
        cos, sin = rotary.at(positions)
        logits = tensor(n, config.vocab_size)
        degrees = torch.ones(n, device=device)
        noise = torch.rand(n, dtype=torch.float64, device=device)
        calls: dict[str, tuple[int, Call]] = {
            "embedding, rotary's rows": (
                2 * (x.nbytes + cos.nbytes + sin.nbytes),
                lambda ops, _, p=positions: ops.embed(p, p, embedding, rotary),
            ),
            "norm": (2 * x.nbytes, lambda ops, _, x=x: ops.norm(x, norm)),
            "QK-norm + rotary": (
                2 * heads.numel() * size,
                lambda ops, _, h=heads, c=cos, s=sin: ops.qk_norm_rope(h, num_q, head_norm, head_norm, c, s),
            ),
            "SiLU · up": (gate_up.nbytes * 3 // 2, lambda ops, _, g=gate_up: ops.swiglu(g)),
            "pick the likeliest": (logits.nbytes, lambda ops, _, z=logits: ops.sample(z)),
            "pick by chance": (logits.nbytes, lambda ops, _, z=logits, t=degrees, u=noise: ops.sample(z, t, u)),
        }
        for name, (moved, call) in calls.items():
            yield Case(name, n, moved, 10 if device.type == "cuda" else 1, call)


def run(device: str, dtype: str, model: str, path: Path, quick: bool, tune: bool) -> dict[str, Any]:
    """Measure, print a table, write `path`."""
    target, kind = parse_device(device), parse_dtype(dtype)
    if target.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("the fused kernels need a GPU, and there is none: TRITON_INTERPRET=1 runs them, very slowly")
    from common.execution.gpu.fused import FusedOps

    config = PRESETS["tiny-qwen3" if quick else model]
    rows = (1, 9) if quick else ROWS
    fused, apart, plain = FusedOps(target), FusedOps(target, pdl=False), Ops()
    measured: list[Measurement] = []
    with torch.inference_mode(), progress_bar("fused kernels", 11 * len(rows)) as advance:
        copy = ceilings(target, kind, quick).copy
        for case in cases(config, kind, target, rows):
            times = [
                seconds_per_call(lambda i, o=ops, c=case: c.call(o, i), target, case.copies, quick)
                for ops in (fused, apart, plain)
            ]
            rate = case.bytes / times[0]
            measured.append(Measurement(case.name, case.rows, *times, rate / 1e9, rate / copy))
            advance(1)
    tuned = tune_products(config, kind, target, fused.launch, copy, quick) if tune else []
    results = {
        "schema": "fused-1",
        "environment": environment(),
        "config": {"device": str(target), "dtype": str(kind).removeprefix("torch."), "model": config.name},
        "ceilings": {"copy_gb_per_s": copy / 1e9},
        "records": [asdict(m) for m in measured],
        "tuned": tuned,
    }
    write_json(path, results)
    print_table(results, measured)
    Console(stderr=True).print(f"wrote {path}", highlight=False)
    return results


@torch.inference_mode()
def tune_products(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, launch: dict[str, Any], copy: float, quick: bool
) -> list[dict[str, Any]]:
    """Each product at a few tokens under other configurations; `chosen` marks what `skinny_config` takes."""
    from common.execution.gpu.triton_skinny import SkinnyConfig, skinny, skinny_config

    jobs: list[tuple[Case, Any, bool, Callable[[int], object]]] = []
    for case in cases(config, dtype, device, (1,) if quick else TUNED_ROWS):
        if case.product is None:
            continue
        weights, x, options = case.product
        gated = bool(options.get("gated"))
        taken = skinny_config(weights[0], case.rows, "norm" in options, gated)
        sizes = [(out, warps) for out in (8, 16, 32) for warps in (4, 8) if out * x.shape[1] <= warps << 13]
        others = [SkinnyConfig(*size, tokens) for tokens in (8, 16) for size in sizes if not gated or size[0] > 8]
        others = [c for c in others if c != taken and c.tokens <= max(8, case.rows)]
        for c in [*([taken] if taken else []), *others[: 1 if quick else None]]:
            call = lambda i, w=weights, x=x, o=options, c=c: skinny(x, w[i], launch, config=c, **o)  # noqa: E731
            jobs.append((case, c, c is taken, call))
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    with progress_bar("tuning", len(jobs)) as advance:
        for case, candidate, chosen, call in jobs:
            if time.perf_counter() - began > TUNE_SECONDS:
                break
            seconds = seconds_per_call(call, device, case.copies, quick)
            rate = case.bytes / seconds
            label = f"out={candidate.out} warps={candidate.warps} tokens={candidate.tokens}"
            record = {"name": case.name, "rows": case.rows, "config": label, "seconds": seconds, "chosen": chosen}
            results.append(record | {"gb_per_s": rate / 1e9, "share": rate / copy})
            advance(1)
    return results


def print_table(results: dict[str, Any], measured: list[Measurement]) -> None:
    copy = results["ceilings"]["copy_gb_per_s"]
    title = f"fused kernels, {results['config']['model']}, {results['config']['dtype']}"
    names = ("rows", "fused", "apart", "plain", "faster", "GB/s", "of copy")
    columns = [Column(name, justify="right") for name in names]
    table = Table("operation", *columns, title=title, caption=f"a copy in this run: {copy:.0f} GB/s")
    for m in measured:
        times = [f"{seconds * 1e6:.1f} µs" for seconds in (m.fused, m.apart, m.plain)]
        table.add_row(m.name, str(m.rows), *times, f"{m.plain / m.fused:.2f}×", f"{m.gb_per_s:.0f}", f"{m.share:.0%}")
    Console().print(table)
    print_best(results["tuned"])
