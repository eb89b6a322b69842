"""From 4-bit weights to a `Decoder`: the checkpoint's own, or a model's weights rounded to nearest at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from common.models.decoder import Decoder
from common.models.linear import Projection, make_linear
from common.models.quantized_weight import QuantizedWeight, concatenate
from common.models.weights import ModelSource, build_decoder, tensor_shapes
from stages.m7_gptq.cpu_linear import Scratch
from stages.m7_gptq.grid import round_to_nearest
from stages.m7_gptq.linear import SideBySide, in_group_order, quantized_linear, select_outputs
from stages.m7_gptq.settings import Settings

ReadQuantized = Callable[[list[str], bool], list[QuantizedWeight | None]]
"""(names, bias): the weights of linear layers, `model.layers.0.self_attn.q_proj` and so on, with their biases if
`bias`; None for a layer that was not quantised."""


def build_quantized_decoder(
    source: ModelSource, read: ReadQuantized, dtype: torch.dtype, device: torch.device, progress: bool | None
) -> Decoder:
    """source: embedding, norms, head, and the layers that were not quantised; read: the others."""
    return build_decoder(source, dtype, device, progress, _Projections(source, read, dtype, device))


def build_rounded_decoder(
    source: ModelSource, settings: Settings, dtype: torch.dtype, device: torch.device, progress: bool | None
) -> Decoder:
    """Every projection rounded to nearest: what a 4-bit model costs in time and memory, not how well it answers."""
    shapes = tensor_shapes(source.config)

    def read(names: list[str], bias: bool) -> list[QuantizedWeight | None]:
        # One tensor after the other as other stages read them: random weights are then theirs, before rounding.
        full = [f"{name}.weight" for name in names]
        weights = [round_to_nearest(source.read(name, shapes[name]), settings) for name in full]
        if not bias:
            return list(weights)
        biases = [source.read(f"{name}.bias", shapes[f"{name}.bias"]) for name in names]
        return [replace(weight, bias=b) for weight, b in zip(weights, biases, strict=True)]

    return build_quantized_decoder(source, read, dtype, device, progress)


class _Projections:
    """Makes the projections of a model, layers of the same input joined into one."""

    def __init__(self, source: ModelSource, read: ReadQuantized, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._read = source, read
        self._shapes = tensor_shapes(source.config)
        self._dtype, self._device = dtype, device
        self._scratch = Scratch()
        self._sorted: dict[str, QuantizedWeight] = {}  # down_proj whose inputs already come sorted

    def __call__(self, names: list[str], bias: bool) -> Projection:
        if names[0] in self._sorted:
            return self._quantized(self._sorted.pop(names[0]))
        weights = self._read(names, bias)
        quantized = [weight for weight in weights if weight is not None]
        if not quantized:
            return self._plain(names, bias)
        if len(quantized) < len(names):  # some were left in full precision
            pairs = zip(names, weights, strict=True)
            return SideBySide([self._plain([n], bias) if w is None else self._quantized(w) for n, w in pairs])
        if names[0].endswith("mlp.gate_proj"):
            quantized = self._fold_order(names[0].replace("gate_proj", "down_proj"), quantized)
        joined = concatenate(quantized)
        return self._quantized(joined) if joined is not None else SideBySide([self._quantized(q) for q in quantized])

    def _quantized(self, weight: QuantizedWeight) -> Projection:
        return quantized_linear(weight, self._dtype, self._device, self._scratch)

    def _plain(self, names: list[str], bias: bool) -> Projection:
        def read(kind: str) -> torch.Tensor:
            tensors = [self._source.read(f"{name}.{kind}", self._shapes[f"{name}.{kind}"]) for name in names]
            return torch.cat([tensor.to(self._device, self._dtype) for tensor in tensors])

        return make_linear(read("weight"), read("bias") if bias else None)

    def _fold_order(self, down_name: str, gate_and_up: list[QuantizedWeight]) -> list[QuantizedWeight]:
        """With act-order, down_proj wants its inputs sorted. They are made one by one, each from the same output of
        gate_proj and up_proj: sorting the outputs of those two costs nothing at run time.

        Not in float32, which keeps the order of its sums for comparisons with the dequantised model.
        """
        if gate_and_up[0].g_idx is None or self._dtype == torch.float32:
            return gate_and_up
        (down,) = self._read([down_name], False)
        if down is None:
            return gate_and_up
        down, order = in_group_order(down)
        if order is None:
            return gate_and_up
        self._sorted[down_name] = down
        return [select_outputs(weight, order) for weight in gate_and_up]
