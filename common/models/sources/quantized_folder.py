"""What folders of quantised models have in common: tensors that stand for a weight, and a description of them."""

import abc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import require
from common.models.quantized_weight import QuantizedWeight
from common.models.sources.hf_folder import HFFolder, open_weights, read_options
from common.models.sources.nf4 import NF4Weight
from common.models.weights import Part, Shape, check_tensors, tensor_shapes
from common.text.json_file import read_json

AnyWeight = QuantizedWeight | NF4Weight
AGAIN = "download the checkpoint again, or quantise the model with --again"
OLDER_FILE, HEAD = "quantize_config.json", "lm_head"


class QuantizedFolder(HFFolder, abc.ABC):
    """A `ModelSource` whose linear layers are quantised: `read` dequantises them, `quantized` gives them as they are.
    meta: what the checkpoint's maker says about how it was made."""

    mark: str  # The part by which a quantised layer is known

    def __init__(self, folder: Path, name: str | None = None) -> None:
        description = quantization(folder)
        where = f"quantization_config in config.json, or {OLDER_FILE}"
        known = isinstance(description, Mapping) and len(description) > 0  # pyright: ignore[reportUnknownArgumentType]
        require(known, f"{folder} is not quantised: {where}, describes nothing")
        self.meta: object = description.get("meta")
        self.folder = folder
        self._understand(name or str(folder), description)
        super().__init__(folder, name, {**read_options(folder), "quantization_config": None})
        if self.config.tie_word_embeddings and f"{HEAD}.{self.mark}" in open_weights(folder, self.weights)[0]:
            self.config = replace(self.config, tie_word_embeddings=False)  # the embedding stays, the head is another

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """What a reader of figures must know where the weights that `read` gives are used."""

    @abc.abstractmethod
    def quantized(self, name: str) -> AnyWeight:
        """One linear layer, such as `model.layers.0.mlp.down_proj`; `UserError` where its numbers cannot be right."""

    def has(self, name: str) -> bool:
        """Is that linear layer quantised?"""
        self.check()
        return f"{name}.{self.mark}" in self._files

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        """A tensor that is not quantised; a quantised weight is given dequantised, in float32, and then cut."""
        base = name.removesuffix(".weight")
        if self.has(base):
            return self.quantized(base).dequantize()[part]
        tensor = super().read(name, shape, part)
        require(bool(tensor.isfinite().all()), f"{self.config.name}: {name} is not finite: {AGAIN}")
        return tensor

    @abc.abstractmethod
    def _understand(self, label: str, description: Mapping[str, Any]) -> None:
        """Take the description; `UserError` for what is not supported."""

    @abc.abstractmethod
    def _stored_shapes(self, base: str, shape: Shape, found: Mapping[str, Shape]) -> tuple[str, dict[str, Shape]]:
        """How a layer is stored, in words, and names and shapes of the tensors that stand for its weight, (-1,) for any
        length; {}: it is not quantised."""

    @abc.abstractmethod
    def _check_first_layer(self) -> None:
        """`UserError` where its numbers cannot be right. Those of other layers are checked when they are read."""

    def _check(self, shapes: dict[str, Shape]) -> None:
        check_tensors(self.config, self._plain_shapes(shapes))
        self._check_first_layer()

    def _plain_shapes(self, found: dict[str, Shape]) -> dict[str, Shape]:
        """The shapes that the weights would have if they were not quantised; `UserError` for wrong parts."""
        shapes, label = dict(found), self.config.name
        for name, shape in tensor_shapes(self.config).items():
            base = name.removesuffix(".weight")
            if not is_quantized(name) and base != HEAD:
                continue
            words, parts = self._stored_shapes(base, shape, found)
            twice = parts and "weight" not in parts and name in found
            require(not twice, f"{label}: {base} has a weight and a {self.mark}: {AGAIN}")
            for kind, wanted in parts.items():
                part, weight = shapes.pop(f"{base}.{kind}", None), f"a weight {list(shape)} {words}"
                require(part is not None, f"{label}: the checkpoint lacks {base}.{kind}, a part of {weight}: {AGAIN}")
                shown, hint = list(part or ()), f"correct config.json, or {AGAIN}"
                wrong = f"{label}: {base}.{kind} has shape {shown}, but {weight} means {list(wanted)}: {hint}"
                require(wanted in (part, (-1,)), wrong)
                shapes[name] = shape
        return shapes


def quantization(folder: Path) -> Any:
    """What describes the quantisation, in config.json or, in older folders, in a file of its own; empty: nothing."""
    found = read_json(folder / "config.json", missing={}).get("quantization_config")
    return found or read_json(folder / OLDER_FILE, missing={})


def is_quantized(name: str) -> bool:
    """Is this tensor the weight of a linear layer inside of the decoder? (The embedding and the head stay.)"""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def fused_names(index: int) -> dict[str, list[str]]:
    """Of each projection of `DecoderLayer`, the checkpoint's layers that it holds."""
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    return {
        "qkv_proj": [f"{attention}.{kind}_proj" for kind in "qkv"],
        "o_proj": [f"{attention}.o_proj"],
        "gate_up_proj": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        "down_proj": [f"{mlp}.down_proj"],
    }


def linear_names(index: int) -> list[str]:
    """The linear layers of a decoder layer, as checkpoints name them."""
    return [name for names in fused_names(index).values() for name in names]
