"""Which matrices a checkpoint has a place for, and its short name."""

from __future__ import annotations

from common.errors import require
from common.models.quantized_weight import PER_CHANNEL, WORD
from common.models.sources.nf4 import BLOCK
from common.models.sources.quantized_folder import is_quantized
from common.models.weights import ModelSource, tensor_shapes
from stages.m7_gptq.settings import Settings


def check_shapes(source: ModelSource, settings: Settings) -> None:
    """`UserError` where the checkpoint format has no place for one of the model's matrices. All layers are alike."""
    for name, shape in tensor_shapes(source.config).items():
        if name.startswith("model.layers.0.") and is_quantized(name):
            check_shape(settings, f"{source.config.name}: {name}", shape[1], shape[0])


def check_shape(settings: Settings, name: str, in_features: int, out_features: int) -> None:
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


def short_name(settings: Settings) -> str:
    """For folders: `4bit-g64-sym-gptq`, and whatever is not usual."""
    if settings.method == "nf4":
        return f"{settings.bits}bit-g{settings.group_size}-nf4"
    group = "channel" if settings.group_size == PER_CHANNEL else f"g{settings.group_size}"
    parts = [f"{settings.bits}bit", group, "sym" if settings.symmetric else "asym", settings.method]
    parts += ["desc_act"] * settings.desc_act + ["nosearch"] * (not settings.search)
    return "-".join(parts + [f"damp{settings.damping:g}"] * (settings.damping != Settings.damping))
