"""What a text computes: `4096 * qwen.kv / 450e9`. In it <a figure> of `benchmarks.report.figures`, and `copy` and
`matmul`, the bytes and operations a second that the machine was measured to reach."""

import re
from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.limits import parameters
from benchmarks.report.figures import evaluate
from benchmarks.report.sources import Machine
from common.errors import UserError
from common.memory import kv_bytes_per_token
from common.models.config import ModelConfig
from common.models.sources.random_weights import PRESETS

FIGURE = re.compile("<([^<>]+)>")


def _shape(config: ModelConfig) -> SimpleNamespace:
    """In bf16. linear, head: weights; read: bytes of them that a step reads; kv: bytes of K and V a token; flops: of a
    token in the linear layers; scores: of a token in attention, for each token of its context."""
    linear, head = parameters(config)
    kv, scores = kv_bytes_per_token(config, torch.bfloat16), 4 * config.num_layers * config.num_heads * config.head_dim
    derived = {"linear": linear, "head": head, "read": 2 * (linear + head), "flops": 2 * linear}
    return SimpleNamespace(**vars(config), **derived, kv=kv, scores=scores)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
_LLAMAS = {"smol": (49152, 576, 1536, 30, 9, 3, 64), "llama70b": (128256, 8192, 28672, 80, 64, 8, 128)}
MODELS = {"qwen": _shape(PRESETS["qwen3-0.6b"])} | {
    name: _shape(replace(PRESETS["llama3-1b"], **dict(zip(_SIZES, sizes, strict=True))))
    for name, sizes in _LLAMAS.items()
}


def compute(machine: Machine, expression: str) -> float | None:
    """None where a figure or a ceiling in it was not measured there; `UserError` for what is no expression."""
    found = [evaluate(machine, name) for name in FIGURE.findall(expression)]
    sheets = [s.values["ceilings"] for s in machine.sheets if "matmul_tflop_per_s" in s.values.get("ceilings", {})]
    if None in found or (not sheets and re.search(r"\b(copy|matmul)\b", expression)):
        return None
    rates = (
        {"copy": sheets[0]["copy_gb_per_s"] * 1e9, "matmul": sheets[0]["matmul_tflop_per_s"] * 1e12} if sheets else {}
    )
    figures = map(repr, found)
    try:
        return eval(FIGURE.sub(lambda _: next(figures), expression), {"__builtins__": {}}, MODELS | rates)
    except (SyntaxError, NameError, AttributeError) as error:
        raise UserError(f"{expression!r} cannot be computed ({error}): correct the placeholder") from error
