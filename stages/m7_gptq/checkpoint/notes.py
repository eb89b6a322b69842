"""What a reader of an engine's figures must know of its weights."""

from __future__ import annotations

import torch

from common.config import EngineConfig
from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models import Decoder
from common.models.decoder import PROJECTIONS
from common.models.linear import Linear
from common.models.sources.random_weights import PREFIX
from stages.m7_gptq.checkpoint.baselines import ROUNDED
from stages.m7_gptq.linear import SideBySide


def dequantized_note(decoder: Decoder, dtype: torch.dtype) -> str | None:
    """How many of a checkpoint's projections are held in full, at least in part; None: none is, or it is float32."""
    every = [getattr(layer, name) for layer in decoder.layers for name in PROJECTIONS]
    parts = [one.projections if isinstance(one, SideBySide) else [one] for one in every]
    count = sum(any(isinstance(part, Linear | OneDnnLinear) for part in some) for some in parts)
    if dtype == torch.float32 or not count:
        return None
    return f"{count} of {len(every)} projections are multiplied dequantised: no kernel here takes their bits or shapes"


def note_of(model: Decoder, config: EngineConfig) -> str | None:
    layers, head = model.note, None
    in_full = config.torch_dtype == torch.float32
    if layers is None and in_full:
        layers = "in float32 m7 multiplies by dequantised weights: no bytes are saved"
    elif layers is None and config.model.startswith(PREFIX):
        layers = f"random weights, rounded to nearest at load ({ROUNDED.bits} bits, groups of {ROUNDED.group_size})"
    if not isinstance(model.head, Linear | OneDnnLinear):
        head = "output head in 8 bits"
    elif config.head_bits == 8 and in_full:
        head = "output head rounded to 8 bits"
    return "; ".join(note for note in (layers, head) if note) or None
