"""Layer by layer over the decoder: calibration text in, quantised layers out, one layer in memory at a time.

All of the calibration text goes through a layer at once. Each of its four projections is quantised when its input
arrives, and answers with its quantised weight: so what comes later is quantised on the inputs that it will really get,
and every layer is computed once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.models.decoder import PROJECTIONS, DecoderLayer
from common.models.layers import RotaryEmbedding
from common.models.linear import Linear
from common.models.ops import Ops
from common.models.sources.quantized_folder import AnyWeight
from common.models.weights import ModelSource, build_layer, loader
from stages.m7_gptq.gptq import Hessian, gptq
from stages.m7_gptq.settings import Settings

CHUNK = 8192  # tokens whose inputs are cast and multiplied at once: enough for a fast product


@dataclass
class QuantizedLayer:
    """The projections of a `DecoderLayer` by their names, with the loss of each (none without calibration)."""

    weights: dict[str, AnyWeight]
    losses: dict[str, float]

    def check(self, index: int) -> None:
        """`UserError` where a scale is not finite; index: of the layer, for the message."""
        for name, weight in self.weights.items():
            if not bool(weight.scales.isfinite().all()):
                raise UserError(f"layer {index}, {name}: weights not finite, or too large for a scale in float16")


Finished = Callable[[int], QuantizedLayer | None]  # what an earlier run left of a layer, if anything


class _Quantizing:
    """Takes a projection's place, and quantises it on the first input it sees."""

    def __init__(self, name: str, linear: Linear, settings: Settings, result: QuantizedLayer) -> None:
        self.name = name
        self.linear = linear
        self.settings = settings
        self.result = result

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hessian = Hessian(x.shape[1], x.device)
        for chunk in x.split(CHUNK):
            hessian.add(chunk)
        weight, loss = gptq(self.linear.weight, hessian.matrix, self.settings, self.linear.bias)
        self.result.weights[self.name], self.result.losses[self.name] = weight, loss
        return F.linear(x, weight.dequantize(x.dtype), self.linear.bias)


def calibrate_layers(
    source: ModelSource,
    token_ids: torch.Tensor,
    settings: Settings,
    device: torch.device,
    finished: Finished = lambda index: None,
) -> Iterator[QuantizedLayer]:
    """Quantise layer after layer by GPTQ; token_ids [sequences, length] is the calibration text.

    A layer that is finished already only passes its outputs on. Computes in float32. `UserError` where weights or
    calibration give numbers that are not finite.
    """
    load = loader(source, torch.float32, device)
    text = _Calibration(source, token_ids.to(device), device)
    for index in range(source.config.num_layers):
        layer = build_layer(source.config, index, load)
        result = finished(index)
        if result is not None:
            for name in PROJECTIONS:
                setattr(layer, name, Linear(result.weights[name].dequantize(), getattr(layer, name).bias))
        else:
            result = QuantizedLayer({}, {})
            for name in PROJECTIONS:
                setattr(layer, name, _Quantizing(name, getattr(layer, name), settings, result))
        text.run(layer, index)
        result.check(index)
        yield result


class _Calibration:
    """The calibration text's hidden states, in front of the next layer."""

    def __init__(self, source: ModelSource, token_ids: torch.Tensor, device: torch.device) -> None:
        config = source.config
        self.sequences, self.length = token_ids.shape
        embedding = loader(source, torch.float32, device)(["model.embed_tokens.weight"])
        self.hidden = F.embedding(token_ids.flatten(), embedding)
        positions = torch.arange(self.length, device=device).repeat(self.sequences)
        self.cos, self.sin = RotaryEmbedding(config, torch.float32, device, self.length).at(positions)
        self.ops = Ops()

    def run(self, layer: DecoderLayer, index: int) -> None:
        self.hidden = layer(self.hidden, self.cos, self.sin, self._attend, self.ops)
        if not bool(torch.isfinite(self.hidden).all()):
            where = f"layer {index} gives numbers that are not finite on the calibration text"
            raise UserError(f"{where}: check its weights")

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Each sequence for itself, causal: [T, H, D] is [sequences, length, H, D]."""
        q, k, v = (x.view(self.sequences, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)
