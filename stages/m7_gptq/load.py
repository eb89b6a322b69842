"""From 4-bit weights to a `Decoder`."""

from __future__ import annotations

import torch

from common.models import Decoder
from common.models.linear import Projection
from common.models.quantized_weight import QuantizedWeight, concatenate
from common.models.weights import ModelSource, build_decoder, loader, plain_projection
from stages.m7_gptq.linear import FastLayers, ReadQuantized, SideBySide, quantized_linear


def build_quantized_decoder(
    source: ModelSource,
    read: ReadQuantized,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None = None,
    fast: FastLayers | None = None,
) -> Decoder:
    """source: embedding, norms, head, and the layers that were not quantised; read: the others. Layers of the same
    input are joined into one."""
    load = loader(source, dtype, device)
    read = read if fast is None else fast.reader(read)

    def quantized(weight: QuantizedWeight) -> Projection:
        return quantized_linear(weight, device, fast)

    def project(names: list[str], bias: bool) -> Projection:
        weights = read(names, bias)
        found = [weight for weight in weights if weight is not None]
        if not found:
            return plain_projection(load, names, bias)
        if len(found) < len(names):  # some were left in full precision
            pairs = zip(names, weights, strict=True)
            return SideBySide([plain_projection(load, [n], bias) if w is None else quantized(w) for n, w in pairs])
        joined = concatenate(found)
        return quantized(joined) if joined is not None else SideBySide([quantized(weight) for weight in found])

    return build_decoder(source, dtype, device, progress, project)
