"""What a reader of an engine's figures must know of its weights."""

from __future__ import annotations

import torch

from common.config import EngineConfig
from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models import Decoder
from common.models.decoder import PROJECTIONS
from common.models.linear import Linear, Projection
from common.models.sources.random_weights import PREFIX
from stages.m7_gptq.checkpoint.baselines import ROUNDED
from stages.m7_gptq.linear import SideBySide


def dequantized_note(decoder: Decoder, dtype: torch.dtype) -> str | None:
    """Which share of a checkpoint's projections has no kernel; None: they all have one, or the engine is in float32."""
    count = _count_dequantized(decoder)
    if dtype == torch.float32 or not count:
        return None
    return (
        f"{count} of {len(PROJECTIONS) * len(decoder.layers)} projections are multiplied dequantised: no "
        "kernel here takes their bits, shapes or groups"
    )


def _count_dequantized(decoder: Decoder) -> int:
    """The projections with any part that is held in full."""
    every = [getattr(layer, name) for layer in decoder.layers for name in PROJECTIONS]
    parts = [one.projections if isinstance(one, SideBySide) else [one] for one in every]
    return sum(any(isinstance(part, Linear | OneDnnLinear) for part in some) for some in parts)


def note_of(model: Decoder, config: EngineConfig) -> str | None:
    """What a reader of the engine's figures must know of its weights."""
    notes = (model.note or _layers_note(config), _head_note(model.head, config))
    return "; ".join(note for note in notes if note) or None


def _layers_note(config: EngineConfig) -> str | None:
    if config.torch_dtype == torch.float32:
        return "in float32 m7 multiplies by dequantised weights: no bytes are saved"
    if config.model.startswith(PREFIX):
        return f"random weights, rounded to nearest at load ({ROUNDED.bits} bits, groups of {ROUNDED.group_size})"
    return None


def _head_note(head: Projection, config: EngineConfig) -> str | None:
    if not isinstance(head, Linear | OneDnnLinear):
        return "output head in 8 bits"
    rounded = config.head_bits == 8 and config.torch_dtype == torch.float32
    return "output head rounded to 8 bits" if rounded else None
