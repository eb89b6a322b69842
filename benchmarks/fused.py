"""The fused kernels alone: each operation of `common.models.ops` against its definition and a copy's bandwidth.

On a GPU every time is that of one call within a CUDA graph, so launches from the host cost nothing on either side.
The calls of one graph take turns over copies of the weights that together exceed the caches, as the layers of a model
do. `fused` lets a kernel start while the previous one ends; `apart` does not. GB/s counts weights and logits, read
once; for the operations between the products, their inputs and outputs.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks import cli
from benchmarks.attention import COLD_BYTES, ceilings, seconds_per_call
from benchmarks.sheet import print_table, write_sheet
from common.config import parse_device, parse_dtype
from common.errors import UserError, unknown
from common.execution.choose import choose_draw
from common.execution.draws import Draws, Kind, RequestDraws
from common.models.config import ModelConfig
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear
from common.models.ops import Ops
from common.models.sources.random_weights import PRESETS
from common.watch.progress import progress_bar

KINDS = {Kind.LIKELIEST: "the likeliest", Kind.DRAWN: "by chance", Kind.DRAWN | Kind.SHARED: "by chance, top_p 0.95"}
ROWS = (1, 2, 4, 8, 16, 32, 64)

Call = Callable[[Ops, int], object]  # call(ops, copy): the operation, on that copy of the weights


@dataclass(frozen=True)
class Case:
    """One operation on `rows` tokens; `bytes` is what it has to move."""

    name: str
    rows: int
    bytes: int
    copies: int
    call: Call


def cases(config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...]) -> Iterator[Case]:
    hidden, dim, size = config.hidden_size, config.head_dim, dtype.itemsize
    num_q, num_kv = config.num_heads, config.num_kv_heads

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    norm, head_norm = RMSNorm(tensor(hidden), config.rms_norm_eps), RMSNorm(tensor(dim), config.rms_norm_eps)
    products: dict[str, tuple[int, int, Callable[..., object]]] = {
        "norm + qkv": ((num_q + 2 * num_kv) * dim, hidden, lambda ops, x, _, p: ops.norm_linear(x, norm, p)),
        "o + residual": (hidden, num_q * dim, lambda ops, x, residual, p: ops.residual_linear(residual, p, x)),
        "norm + gate, up + SiLU": (
            2 * config.intermediate_size, hidden, lambda ops, x, _, p: ops.norm_swiglu(x, norm, p)
        ),
        "down + residual": (
            hidden, config.intermediate_size, lambda ops, x, residual, p: ops.residual_linear(residual, p, x)
        ),
        "norm + head": (config.vocab_size, hidden, lambda ops, x, _, p: ops.norm_linear(x, norm, p)),
    }  # fmt: skip
    for name, (outputs, width, product) in products.items():
        copies = max(2, -(-COLD_BYTES[device.type] // (outputs * width * size))) if device.type == "cuda" else 2
        layers = [Linear(tensor(outputs, width) * width**-0.5) for _ in range(copies)]
        for n in rows:
            x, residual = tensor(n, width), tensor(n, outputs)
            call: Call = lambda ops, i, f=product, x=x, r=residual, p=layers: f(ops, x, r, p[i])  # noqa: E731
            yield Case(name, n, layers[0].weights_bytes(), copies, call)
    rotary = RotaryEmbedding(replace(config, max_position_embeddings=max(rows)), dtype, device)
    embedding = tensor(config.vocab_size, hidden)
    for n in rows:
        x, qkv, gate_up = tensor(n, hidden), tensor(n, num_q + 2 * num_kv, dim), tensor(n, 2 * config.intermediate_size)
        heads = qkv[:, : num_q + num_kv]
        positions = torch.arange(n, device=device)
        cos, sin = rotary.at(positions)
        logits = tensor(n, config.vocab_size)
        draws = _draws(n, logits)
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
        }
        for kind, what in KINDS.items():
            calls[f"pick {what}"] = logits.nbytes, partial(_drawn, logits, draws, kind)
        for name, (moved, call) in calls.items():
            yield Case(name, n, moved, 10 if device.type == "cuda" else 1, call)


def _drawn(logits: torch.Tensor, draws: Draws, kind: Kind, ops: Ops, _: int) -> torch.Tensor:
    choose_draw(ops)(logits, draws, kind)
    return draws.tokens


def _draws(rows: int, logits: torch.Tensor) -> Draws:
    """All at temperature 0.7 with top_p 0.95."""
    requests = RequestDraws(rows, logits.shape[1], logits.device)
    requests.settings[:, 0], requests.settings[:, 2] = 0.7, 0.95
    settings, keys = (torch.from_numpy(x[:rows]).to(logits.device) for x in (requests.settings, requests.keys))
    return Draws(settings, keys, requests.marks, keys.new_zeros(rows), logits, requests.biased, requests.bias)


def run(
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ...")] = "auto",
    dtype: cli.Dtype = "bf16",
    model: Annotated[str, typer.Option(help="Whose shapes: qwen3-0.6b, qwen3-4b, llama3-1b, ...")] = "qwen3-0.6b",
    path: cli.JsonFile = None,
    quick: cli.Quick = False,
) -> dict[str, Any]:
    """Time the fused kernels alone against plain PyTorch, at the shapes of a model, next to a copy."""
    if model not in PRESETS:
        raise unknown("model", model, PRESETS)
    path, _ = cli.places(path, None, "fused.json")
    target, kind = parse_device(device), parse_dtype(dtype)
    if target.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("the fused kernels need a GPU, and there is none: TRITON_INTERPRET=1 runs them, very slowly")
    from common.execution.gpu.fused import FusedOps

    config = PRESETS["tiny-qwen3" if quick else model]
    rows = (1, 9) if quick else ROWS
    ways = {"fused": FusedOps(target), "apart": FusedOps(target, pdl=False), "plain": Ops()}
    records: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar("fused kernels", 12 * len(rows)) as advance:
        copy = ceilings(target, kind, quick).copy
        for case in cases(config, kind, target, rows):
            times = {
                name: seconds_per_call(lambda i, o=o, c=case: c.call(o, i), target, case.copies, quick)
                for name, o in ways.items()
            }
            rate = case.bytes / times["fused"]
            measured = {"name": case.name, "rows": case.rows, **times, "gb_per_s": rate / 1e9, "share": rate / copy}
            records.append(measured)
            advance(1)
    setting = {"device": str(target), "dtype": str(kind).removeprefix("torch."), "model": config.name}
    results = write_sheet(path, "fused-1", setting, records, ceilings={"copy_gb_per_s": copy / 1e9})
    show(results)
    print(f"wrote {path}", file=sys.stderr)
    return results


def show(results: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = []
    for r in results["records"]:
        times = [f"{r[name] * 1e6:.1f} µs" for name in ("fused", "apart", "plain")]
        faster = f"{r['plain'] / r['fused']:.2f}×"
        rows.append((r["name"], str(r["rows"]), *times, faster, f"{r['gb_per_s']:.0f}", f"{r['share']:.0%}"))
    print_table(
        f"fused kernels, {results['config']['model']}, {results['config']['dtype']}",
        ("operation", "rows", "fused", "apart", "plain", "faster", "GB/s", "of copy"),
        rows,
        caption=f"a copy in this run: {results['ceilings']['copy_gb_per_s']:.0f} GB/s",
    )
