"""Which weights an engine gets: those of a folder, of one made before, or of one made now; random ones are rounded."""

from __future__ import annotations

import torch

from common.config import DEFAULT_MODEL, EngineConfig
from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models import Decoder, Loaded, prepare
from common.models.decoder import PROJECTIONS
from common.models.linear import Linear
from common.models.load import find_folder, open_quantized_folder, open_source
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.nf4_folder import NF4Folder
from common.models.sources.quantized_folder import is_quantized_folder
from common.models.sources.random_weights import PREFIX
from common.models.weights import build_decoder
from stages.m7_gptq.checkpoint.baselines import ROUNDED, rounding_reader
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.head import eight_bit_head
from stages.m7_gptq.linear import FastLayers, SideBySide
from stages.m7_gptq.load import build_quantized_decoder
from stages.m7_gptq.settings import Settings


@torch.inference_mode()
def load_quantized(config: EngineConfig, fast: FastLayers | None = None) -> Loaded:
    """m7's `load_for`: the same, with the decoder's linear layers in 4 bits and its head in 8. float32 multiplies by
    the dequantised weights. A model that is not quantised yet is quantised first, with a progress bar, and kept in the
    cache."""
    dtype, device = config.torch_dtype, config.torch_device
    if config.model.startswith(PREFIX):
        source, tokenizer = open_source(config.model, device, config.seed), None
        decoder = build_quantized_decoder(source, rounding_reader(source), dtype, device, fast=fast)
    else:
        folder = open_quantized(config.model, device)
        decoder, tokenizer = build_from(folder, dtype, device, fast), folder.tokenizer()
    if config.head_bits == 8:
        decoder.head = eight_bit_head(decoder.head, fast)
    decoder.note = note_of(decoder, config)
    return prepare(decoder, tokenizer, config, config.fused_kernels)


def build_from(
    folder: GPTQFolder | NF4Folder, dtype: torch.dtype, device: torch.device, fast: FastLayers | None = None
) -> Decoder:
    """A decoder whose projections are the folder's: NF4's dequantised, for which there is no kernel."""
    if isinstance(folder, NF4Folder):
        decoder = build_decoder(folder, dtype, device, None)
        decoder.note = folder.note
        return decoder
    decoder = build_quantized_decoder(
        folder, lambda names, _: [folder.quantized(n) for n in names], dtype, device, fast=fast
    )
    decoder.note = dequantized_note(decoder, dtype)
    return decoder


def open_quantized(model: str, device: torch.device) -> GPTQFolder | NF4Folder:
    """The model's checkpoint: the folder that it is, or its quantised twin in the cache, made where it is missing."""
    folder = find_folder(model) if model != DEFAULT_MODEL else None
    if folder is None or not is_quantized_folder(folder):
        folder = quantize(model, Settings(), device=device).folder
    return open_quantized_folder(folder, model)


def dequantized_note(decoder: Decoder, dtype: torch.dtype) -> str | None:
    """How many of a checkpoint's projections are held in full, at least in part; None: none is, or it is float32."""
    every = [getattr(layer, name) for layer in decoder.layers for name in PROJECTIONS]
    parts = [one.projections if isinstance(one, SideBySide) else [one] for one in every]
    count = sum(any(isinstance(part, Linear | OneDnnLinear) for part in some) for some in parts)
    if dtype == torch.float32 or not count:
        return None
    return f"{count} of {len(every)} projections are multiplied dequantised: no kernel here takes their bits or shapes"


def note_of(model: Decoder, config: EngineConfig) -> str | None:
    """What a reader of the engine's figures must know of its weights."""
    layers, head = model.note, None
    naive, in_full = config.linear_backend == "naive", config.torch_dtype == torch.float32
    if layers is None and naive:
        layers = "linear_backend=naive: 4-bit weights are dequantised at every call"
    elif layers is None and in_full:
        layers = "in float32 m7 multiplies by dequantised weights: no bytes are saved"
    elif layers is None and config.model.startswith(PREFIX):
        layers = f"random weights, rounded to nearest at load ({ROUNDED.bits} bits, groups of {ROUNDED.group_size})"
    if not isinstance(model.head, Linear | OneDnnLinear):
        head = "output head in 8 bits"
    elif config.head_bits == 8 and in_full:
        head = "output head rounded to 8 bits"
    return "; ".join(note for note in (layers, head) if note) or None
