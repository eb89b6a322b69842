"""From 4-bit weights to a `Decoder`, and which weights an engine gets."""

from __future__ import annotations

import torch

from common.config import EngineConfig
from common.models import Decoder, Loaded, prepare
from common.models.linear import Projection, make_linear
from common.models.load import QuantizedFolder, open_source
from common.models.quantized_weight import QuantizedWeight, concatenate
from common.models.sources.nf4_folder import NF4Folder
from common.models.sources.random_weights import PREFIX
from common.models.weights import ModelSource, build_decoder, tensor_shapes
from stages.m7_gptq.checkpoint.baselines import rounding_reader
from stages.m7_gptq.checkpoint.model import open_quantized
from stages.m7_gptq.checkpoint.notes import dequantized_note, note_of
from stages.m7_gptq.head import eight_bit_head
from stages.m7_gptq.linear import FastLayers, ReadQuantized, SideBySide, quantized_linear


@torch.inference_mode()
def load_quantized(config: EngineConfig, fast: FastLayers | None = None, fused: bool = False) -> Loaded:
    """m7's `load_for`: the same, with the decoder's linear layers in 4 bits and its head in 8. float32 multiplies by
    the dequantised weights. A model that is not quantised yet is quantised first, with a progress bar, and kept in the
    cache."""
    dtype, device = config.torch_dtype, config.torch_device
    if config.model.startswith(PREFIX):
        source, tokenizer = open_source(config.model, device, config.seed), None
        decoder = build_quantized_decoder(source, rounding_reader(source), dtype, device, None, fast)
    else:
        folder = open_quantized(config.model, device)
        decoder, tokenizer = build_from(folder, dtype, device, fast), folder.tokenizer()
    if config.head_bits == 8:
        decoder.head = eight_bit_head(decoder.head, fast)
    decoder.note = note_of(decoder, config)
    return prepare(decoder, tokenizer, config, fused)


def build_from(
    folder: QuantizedFolder, dtype: torch.dtype, device: torch.device, fast: FastLayers | None = None
) -> Decoder:
    """A decoder whose projections are the folder's: NF4's dequantised, for which there is no kernel."""
    if isinstance(folder, NF4Folder):
        decoder = build_decoder(folder, dtype, device, None)
        decoder.note = folder.note
        return decoder
    decoder = build_quantized_decoder(
        folder, lambda names, _: [folder.quantized(n) for n in names], dtype, device, None, fast
    )
    decoder.note = dequantized_note(decoder, dtype)
    return decoder


def build_quantized_decoder(
    source: ModelSource,
    read: ReadQuantized,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None,
    fast: FastLayers | None = None,
) -> Decoder:
    """source: embedding, norms, head, and the layers that were not quantised; read: the others. Layers of the same
    input are joined into one."""
    shapes = tensor_shapes(source.config)
    read = read if fast is None else fast.reader(read)

    def quantized(weight: QuantizedWeight) -> Projection:
        return quantized_linear(weight, dtype, device, fast)

    def plain(names: list[str], bias: bool) -> Projection:
        def joined(kind: str) -> torch.Tensor:
            tensors = [source.read(f"{name}.{kind}", shapes[f"{name}.{kind}"]) for name in names]
            return torch.cat([tensor.to(device, dtype) for tensor in tensors])

        return make_linear(joined("weight"), joined("bias") if bias else None)

    def project(names: list[str], bias: bool) -> Projection:
        weights = read(names, bias)
        found = [weight for weight in weights if weight is not None]
        if not found:
            return plain(names, bias)
        if len(found) < len(names):  # some were left in full precision
            pairs = zip(names, weights, strict=True)
            return SideBySide([plain([n], bias) if w is None else quantized(w) for n, w in pairs])
        joined = concatenate(found)
        return quantized(joined) if joined is not None else SideBySide([quantized(weight) for weight in found])

    return build_decoder(source, dtype, device, progress, project)
