"""Which 4-bit weights an engine gets: a folder's own, those made before, those made now, or random ones, rounded."""

from __future__ import annotations

import torch

from common.config import DEFAULT_MODEL, EngineConfig
from common.models import Decoder, Loaded, prepare
from common.models.linear import Linear, PackedLinear, Projection
from common.models.load import QuantizedFolder, find_folder, open_quantized_folder, open_source
from common.models.sources.gptq_folder import is_quantized_folder
from common.models.sources.nf4_folder import NF4Folder
from common.models.sources.random_weights import PREFIX
from common.models.weights import build_decoder
from stages.m7_gptq.calibrate import PROJECTIONS
from stages.m7_gptq.head import Int8Head, eight_bit_head
from stages.m7_gptq.linear import Permuted, SideBySide
from stages.m7_gptq.load import build_quantized_decoder, build_rounded_decoder
from stages.m7_gptq.quantize import quantize
from stages.m7_gptq.settings import Settings

ROUNDED = Settings(group_size=128, search=False, method="rtn")
"""What random weights are rounded with, for speed alone: there is nothing to calibrate."""


@torch.inference_mode()
def load_quantized(config: EngineConfig, fused: bool = False) -> Loaded:
    """m7's `load_for`: the same, with the decoder's linear layers in 4 bits and its head in 8. float32 multiplies by
    the dequantised weights. A model that is not quantised yet is quantised first, with a progress bar, and kept in the
    cache."""
    dtype, device = config.torch_dtype, config.torch_device
    if config.model.startswith(PREFIX):
        source = open_source(config.model, device, config.seed)
        decoder, tokenizer = build_rounded_decoder(source, ROUNDED, dtype, device, None), None
    else:
        folder = open_quantized(config.model, device)
        decoder, tokenizer = build_from(folder, dtype, device), folder.tokenizer()
    if config.head_bits == 8:
        decoder.head = eight_bit_head(decoder.head)
    return prepare(decoder, tokenizer, config, fused)


def open_quantized(model: str, device: torch.device) -> QuantizedFolder:
    """The model's checkpoint: the folder that it is, or its quantised twin in the cache, made where it is missing."""
    folder = find_folder(model) if model != DEFAULT_MODEL else None
    if folder is None or not is_quantized_folder(folder):
        folder = quantize(model, Settings(), device=device).folder
    return open_quantized_folder(folder, model)


def build_from(folder: QuantizedFolder, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder whose projections are the folder's: NF4's dequantised, for which there is no kernel."""
    if isinstance(folder, NF4Folder):
        decoder = build_decoder(folder, dtype, device, None)
        decoder.note = folder.note
        return decoder
    decoder = build_quantized_decoder(
        folder, lambda names, _: [folder.quantized(n) for n in names], dtype, device, None
    )
    if dtype != torch.float32 and (dequantized := _count_dequantized(decoder)):
        decoder.note = (
            f"{dequantized} of {len(PROJECTIONS) * len(decoder.layers)} projections are multiplied dequantised: no "
            "kernel here takes their bits, shapes or groups"
        )
    return decoder


def _count_dequantized(decoder: Decoder) -> int:
    """The projections with any part that is held in full."""

    def parts(projection: Projection) -> list[Projection]:
        if isinstance(projection, SideBySide):
            return [part for inner in projection.projections for part in parts(inner)]
        return parts(projection.projection) if isinstance(projection, Permuted) else [projection]

    every = [getattr(layer, name) for layer in decoder.layers for name in PROJECTIONS]
    return sum(any(isinstance(part, (Linear, PackedLinear)) for part in parts(projection)) for projection in every)


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
    if isinstance(head, Int8Head):
        return "output head in 8 bits"
    rounded = config.head_bits == 8 and config.torch_dtype == torch.float32
    return "output head rounded to 8 bits" if rounded else None
