"""What the baselines leave to choose, which matrices a checkpoint has a place for, and its short name."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from common.errors import require
from common.models.quantized_weight import PER_CHANNEL, WORD
from common.models.sources.nf4 import BLOCK

if TYPE_CHECKING:
    from stages.m7_gptq.settings import Settings


def usual_group_size(method: str) -> int:
    """Inputs of a group where none is given."""
    return BLOCK if method == "nf4" else 32


def check_baseline(settings: Settings) -> None:
    """`UserError` for settings that a baseline has no use for; NF4 leaves no choice at all."""
    damping = type(settings).damping
    no_order = settings.method != "rtn" or (not settings.desc_act and settings.damping == damping)
    require(no_order, "rtn rounds each weight for itself: leave out desc_act and damping")
    if settings.method == "nf4":
        usual = {f.name: f.default for f in fields(settings)} | {"group_size": BLOCK, "method": "nf4"}
        other = [f"{word}={value}" for word, value in vars(settings).items() if value != usual[word]]
        require(not other, f"nf4 is 4 bits in blocks of {BLOCK}, with nothing to choose: leave out {', '.join(other)}")


def check_shape(settings: Settings, name: str, in_features: int, out_features: int) -> None:
    """`UserError` where the checkpoint format has no place for a matrix of this shape."""
    if settings.method == "nf4":
        fits = in_features % BLOCK == 0
        require(fits, f"{name} has {in_features} inputs: they must be a multiple of {BLOCK} to be stored in NF4")
        return
    count = WORD // settings.bits
    require(
        in_features % count == 0 and out_features % count == 0,
        f"{name} is {out_features} x {in_features}: both must be multiples of {count} to be stored in "
        f"{settings.bits} bits",
    )


def folder_name(settings: Settings) -> str:
    """`4bit-g64-sym-gptq`, and whatever is not usual."""
    if settings.method == "nf4":
        return f"{settings.bits}bit-g{settings.group_size}-nf4"
    group = "channel" if settings.group_size == PER_CHANNEL else f"g{settings.group_size}"
    parts = [f"{settings.bits}bit", group, "sym" if settings.symmetric else "asym", settings.method]
    parts += ["desc_act"] * settings.desc_act + ["nosearch"] * (not settings.search)
    usual = settings.damping == type(settings).damping or settings.method == "rtn"
    return "-".join(parts + ([] if usual else [f"damp{settings.damping:g}"]))
