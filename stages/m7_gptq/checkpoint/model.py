"""What an engine is built from: a folder, one made before, or one made now; random weights are rounded."""

from dataclasses import dataclass

import torch

from common.config import EngineConfig
from common.models import Decoder
from common.models.decoder import PROJECTIONS
from common.models.linear import Linear, PackedLinear
from common.models.load import open_quantized_folder
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.nf4_folder import NF4Folder
from common.models.sources.quantized_folder import QuantizedFolder
from common.models.sources.random_weights import PREFIX
from common.models.weights import ModelSource, Part
from stages.m7_gptq.checkpoint.baselines import ROUNDED, rounding_reader
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.linear import ReadQuantized, SideBySide
from stages.m7_gptq.settings import Settings


@dataclass(frozen=True)
class Checkpoint:
    """source: embedding, norms, head, and what `read`, which gives the 4-bit layers, does not have: NF4's weights,
    for which there is no kernel, are dequantised."""

    config: EngineConfig
    source: ModelSource
    read: ReadQuantized

    def note(self, model: Decoder) -> str | None:
        """What a reader of the engine's figures must know of its weights."""
        config, in_full = self.config, self.config.torch_dtype == torch.float32
        if isinstance(self.source, NF4Folder):
            layers = self.source.note
        elif config.linear_backend == "naive":
            layers = "linear_backend=naive: the weights are dequantised at every call"
        elif in_full:
            layers = "in float32 m7 multiplies by dequantised weights: no bytes are saved"
        elif config.model.startswith(PREFIX):
            layers = f"random weights, rounded to nearest at load ({ROUNDED.bits} bits, groups of {ROUNDED.group_size})"
        else:
            every = [getattr(layer, name) for layer in model.layers for name in PROJECTIONS]
            parts = [one.projections if isinstance(one, SideBySide) else [one] for one in every]
            count = sum(any(isinstance(part, Linear | PackedLinear) for part in some) for some in parts)
            held = f"{count} of {len(every)} projections are multiplied unquantised"
            layers = f"{held}: stored so, or no kernel here takes their bits or shapes" if count else None
        head = None if isinstance(model.head, Linear | PackedLinear) else "output head in 8 bits"
        if head is None and config.head_bits == 8 and in_full:
            head = "output head rounded to 8 bits"
        return "; ".join(note for note in (layers, head) if note) or None


def open_checkpoint(config: EngineConfig, source: ModelSource) -> Checkpoint:
    """What the source's decoder is built from in m7. A model that is not quantised yet is quantised first, layer after
    layer, with a progress bar, and kept in the cache; random weights are rounded to nearest."""

    def part(name: str) -> Part:
        return config.ranks.split.part(f"{name}.weight") if config.ranks else ()

    if config.model.startswith(PREFIX):
        return Checkpoint(config, source, rounding_reader(source, part=part))
    if not isinstance(source, QuantizedFolder):
        folder = quantize(config.model, Settings(), device=config.torch_device, source=source).folder
        source = open_quantized_folder(folder, config.model)
    gptq = source if isinstance(source, GPTQFolder) else None
    return Checkpoint(
        config, source, lambda names, _: [gptq.quantized(n, part(n)) if gptq and gptq.has(n) else None for n in names]
    )
