"""From a model's name to a decoder whose linear layers are quantised: the whole way, in order."""

import torch

from common.config import EngineConfig
from common.errors import refusing
from common.models import Decoder
from common.models.linear import Projection
from common.models.load import Loaded, open_source, own_part, prepare, read_tokenizer
from common.models.quantized_weight import QuantizedWeight, concatenate
from common.models.weights import ModelSource, build_decoder, loader, plain_projection
from stages.m7_gptq.checkpoint.model import open_checkpoint
from stages.m7_gptq.head import eight_bit_head
from stages.m7_gptq.linear import FastLayers, ReadQuantized, SideBySide, quantized_linear


@torch.inference_mode()
def load_quantized(config: EngineConfig, fast: FastLayers | None = None) -> Loaded:
    """m7's `load_for`: linear layers in 4 bits, head in 8. fast: makes them; None: they are the definitions."""
    dtype, device = config.torch_dtype, config.torch_device
    source = open_source(config.model, device, config.seed, progress=None)
    tokenizer = read_tokenizer(source, config.chat_template)  # first: it is refused sooner than layers are made
    # A model that is quantised already is read as it is. Of another one the cache has a quantised folder. Where it has
    # none, `calibrate_layers` quantises layer after layer by `gptq`, and each is written when it is done.
    checkpoint = open_checkpoint(config, source)
    with refusing(source.config.name):
        own = own_part(checkpoint.source, config)
        decoder = build_quantized_decoder(own, checkpoint.read, dtype, device, fast=fast)
    if config.head_bits == 8:
        decoder.head = eight_bit_head(decoder.head, fast)
    decoder.note = checkpoint.note(decoder)
    return prepare(decoder, tokenizer, config, config.fused_kernels)


def build_quantized_decoder(
    source: ModelSource, read: ReadQuantized, dtype: torch.dtype, device: torch.device, progress: bool | None = None,
    fast: FastLayers | None = None,
) -> Decoder:  # fmt: skip
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
