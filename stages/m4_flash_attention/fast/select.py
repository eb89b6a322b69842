"""Which backend: the one that was asked for, or the first of the device's list that can run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from common.config import ATTENTION_BACKENDS
from common.errors import UserError, unknown
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend

MODULES = {
    "naive": "definition",
    "torch": "torch_sdpa",
    "triton": "triton",
    "flash_attn": "flash_attn",
    "cpu": "cpu",
}
PREFERENCE = {"cuda": ("triton", "flash_attn", "torch"), "cpu": ("cpu", "torch")}
"""What `auto` tries, in the order of decode speed (`python -m benchmarks attention`; for long prefills `torch` can be
faster). `flash_attn` was not measured; `torch` runs everywhere."""
WHY = {
    "triton": "reads the blocks in place; of those measured on a GPU the fastest at decode",
    "flash_attn": "reads the blocks in place",
    "cpu": "reads the blocks in place; of those measured on a CPU the fastest",
    "torch": "runs everywhere",
}

CAPTURABLE = ("triton", "flash_attn", "cpu")
"""Whose steps do nothing but queue kernels whose shapes follow from the batch's, so that a graph can repeat them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`reason`: one line for the user: what was chosen and why."""

    name: str
    reason: str
    backend: Backend

    @property
    def capturable(self) -> bool:
        return self.name in CAPTURABLE


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"stages.m4_flash_attention.fast.backends.{MODULES[name]}")


def why_not(name: str, shape: AttentionShape) -> str | None:
    """None where the backend can run with this shape, or the reason why it cannot."""
    return _module(name).why_not(shape)


def choose(name: str, shape: AttentionShape) -> Choice:
    """`name` is one of `ATTENTION_BACKENDS`; a backend that cannot run is a `UserError` that names those that can."""
    if name not in ATTENTION_BACKENDS:
        raise unknown("attention_backend", name, ATTENTION_BACKENDS)
    if name != "auto":
        if reason := why_not(name, shape):
            able = [other for other in MODULES if why_not(other, shape) is None]
            hint = f"Choose from: auto, {', '.join(able)}"
            raise UserError(f"attention_backend {name!r} cannot run here: {reason}. {hint}")
        return Choice(name, f"attention: {name}, as asked for", _module(name).create(shape))
    if shape.device.type not in PREFERENCE:
        raise UserError(
            f"attention_backend 'auto' knows {' and '.join(PREFERENCE)}, not {shape.device}: name a backend"
        )
    refused: list[str] = []
    for candidate in PREFERENCE[shape.device.type]:
        if reason := why_not(candidate, shape):
            refused.append(f"not {candidate}: {reason}")
            continue
        why = "; ".join([WHY[candidate], *refused])
        return Choice(candidate, f"attention: {candidate} ({why})", _module(candidate).create(shape))
    raise AssertionError("the torch backend runs everywhere")
