"""Reads folders in the format of AutoGPTQ and its successor GPTQModel: safetensors in which a linear layer's `weight`
is replaced by `qweight`, `qzeros`, `scales` and `g_idx`, and a description of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from common.errors import UserError, require
from common.models.quantized_weight import BITS, PER_CHANNEL, WORD, Format, QuantizedWeight, unpack_zeros
from common.models.sources.gptq_checks import check_numbers, check_version
from common.models.sources.hf_folder import open_weights, read_config, read_json, read_tensor
from common.models.weights import Shape, check_tensors, tensor_shapes
from common.text.tokenizer import Tokenizer

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Stored:
    """How a folder says that it is quantised. group_size is -1 for one group per output channel."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    form: Format

    @classmethod
    def from_dict(cls, name: str, options: Mapping[str, Any]) -> Stored:
        """From `quantization_config` or quantize_config.json; `UserError` for what is not supported."""
        method = options.get("quant_method") or options.get("method") or "gptq"
        hint = "GPTQ is, NF4 of bitsandbytes, and checkpoints that are not quantised"
        require(method == "gptq", f"{name}: quant_method {method!r} is not supported: {hint}")
        bits, group = options.get("bits"), options.get("group_size", PER_CHANNEL)
        require(type(bits) is int and bits in BITS, f"{name}: bits={bits!r} is not supported: GPTQ with 4 or 8 bits is")
        whole = isinstance(group, int) and not isinstance(group, bool) and (group == PER_CHANNEL or group > 0)
        require(whole, f"{name}: group_size={group!r} is not supported: a positive number, or -1 for none")
        form = options.get("checkpoint_format") or options.get("format") or "gptq"
        require(
            form in ("gptq", "gptq_v2"),
            f"{name}: checkpoint_format {form!r} is not supported: 'gptq' and 'gptq_v2' are",
        )
        packed = options.get("pack_dtype") or "int32"
        require(packed == "int32", f"{name}: pack_dtype {packed!r} is not supported: 'int32' is")
        require(not options.get("lm_head"), f"{name}: a quantised lm_head is not supported")
        require(not options.get("dynamic"), f"{name}: settings of its own for some layers (dynamic) are not supported")
        symmetric, desc_act = options.get("sym", True), options.get("desc_act", False)
        for word, value in (("sym", symmetric), ("desc_act", desc_act)):
            require(isinstance(value, bool), f"{name}: {word}={value!r} is not supported: true or false")
        return cls(cast(int, bits), cast(int, group), symmetric, desc_act, cast(Format, form))

    def group_of(self, in_features: int) -> int:
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Shapes of the tensors that stand for a weight [rows, columns]."""
        count = WORD // self.bits
        groups = -(-columns // self.group_of(columns))
        return {
            "qweight": (columns // count, rows),
            "qzeros": (groups, rows // count),
            "scales": (groups, rows),
            "g_idx": (columns,),
        }


class GPTQFolder:
    """A quantised model's folder: a `ModelSource` for all that is not quantised, and `quantized` for what is."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        label = name or str(folder)
        require((folder / "config.json").is_file(), f"{folder} has no config.json: give a GPTQ model's folder")
        options = read_json(folder / "config.json")
        quantization = _quantization(folder, options)
        self.stored = Stored.from_dict(label, quantization)
        self.meta: object = quantization.get("meta")
        """What its maker says about how it was made."""
        plain = {key: value for key, value in options.items() if key != "quantization_config"}
        self.config = read_config(folder, label, plain)
        self._files: dict[str, Any] = {}

    @property
    def note(self) -> str:
        """What a reader of figures must know where the weights that `read` gives are used."""
        stored = self.stored
        group = "one group per output" if stored.group_size == PER_CHANNEL else f"groups of {stored.group_size}"
        return f"dequantised at load from {stored.bits}-bit GPTQ, {group}: no bytes are saved"

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder, self.config.eos_token_ids)

    def check(self) -> None:
        """Open the weight files, once; `UserError` unless every tensor is there in the shape that the configuration
        says, and the first layer's zero points are stored as it says. The numbers of the others are checked when they
        are read."""
        if self._files:
            return
        files, shapes = open_weights(self.folder)
        check_tensors(self.config, self._plain_shapes(files, shapes))
        self._files = files
        try:
            first = [self._read_quantized(name) for name in linear_names(0)]
            check_version(self.config.name, first, self.stored.symmetric, self.stored.form)
            for name, weight in zip(linear_names(0), first, strict=True):
                check_numbers(f"{self.config.name}: {name}", weight, self.stored.symmetric)
        except UserError:
            self._files = {}
            raise

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """A tensor that is not quantised; a quantised weight is given dequantised, in float32."""
        self.check()
        if is_quantized(name):
            return self.quantized(name.removesuffix(".weight")).dequantize()
        tensor = read_tensor(self._files[name], self.config.name, name)
        require(bool(torch.isfinite(tensor).all()), f"{self.config.name}: {name} is not finite: download it again")
        return tensor

    def quantized(self, name: str) -> QuantizedWeight:
        """One linear layer, such as `model.layers.0.mlp.down_proj`; `UserError` where its numbers cannot be right."""
        self.check()
        weight = self._read_quantized(name)
        check_numbers(f"{self.config.name}: {name}", weight, self.stored.symmetric)
        return weight

    def _read_quantized(self, name: str) -> QuantizedWeight:
        def part(kind: str) -> torch.Tensor:
            return self._files[f"{name}.{kind}"].get_tensor(f"{name}.{kind}")

        stored, label = self.stored, f"{self.config.name}: {name}"
        qweight, qzeros, scales = part("qweight"), part("qzeros"), part("scales")
        for kind, tensor in (("qweight", qweight), ("qzeros", qzeros)):
            require(tensor.dtype == torch.int32, f"{label}.{kind} holds {tensor.dtype}, not int32: it is mislabelled")
        require(scales.is_floating_point(), f"{label}.scales hold {scales.dtype}, no floating point: download it again")
        weight = QuantizedWeight(
            qweight=qweight,
            scales=scales,
            zeros=unpack_zeros(qzeros, stored.bits, stored.form),
            g_idx=None,
            bits=stored.bits,
            group_size=stored.group_of(qweight.shape[0] * WORD // stored.bits),
            bias=part("bias") if f"{name}.bias" in tensor_shapes(self.config) else None,
        )
        if f"{name}.g_idx" in self._files:
            g_idx = part("g_idx")
            require(not g_idx.is_floating_point(), f"{label}.g_idx holds {g_idx.dtype}, no integers: download it again")
            g_idx = g_idx.to(torch.int32)
            within = int(g_idx.min()) >= 0 and int(g_idx.max()) < weight.groups
            require(within, f"{label}.g_idx names groups outside of 0 to {weight.groups - 1}: the file is damaged")
            weight.g_idx = None if torch.equal(g_idx.long(), weight.group_index()) else g_idx
        return weight

    def _plain_shapes(self, files: dict[str, Any], found: dict[str, Shape]) -> dict[str, Shape]:
        """The shapes that the weights would have if they were not quantised; `UserError` for wrong parts."""
        shapes, plain = dict(found), tensor_shapes(self.config)
        for name, shape in plain.items():
            if not is_quantized(name):
                continue
            base = name.removesuffix(".weight")
            wanted = self.stored.shapes(*shape)
            if f"{base}.g_idx" not in found and not self.stored.desc_act:  # some writers leave out what says nothing
                del wanted["g_idx"]
            for kind, wanted_shape in wanted.items():
                part = shapes.pop(f"{base}.{kind}", None)
                require(part is not None, f"{self.config.name}: the checkpoint lacks {base}.{kind}: download it again")
                require(
                    part == wanted_shape,
                    f"{self.config.name}: {base}.{kind} has shape {list(part or ())}, but bits={self.stored.bits} and "
                    f"group_size={self.stored.group_size} mean {list(wanted_shape)}: correct config.json, or "
                    "download the model again",
                )
            bias = f"{base}.bias"
            if bias in shapes and bias not in plain:  # AutoGPTQ writes zeros where the model has no bias
                require(
                    not bool(files[bias].get_tensor(bias).any()),
                    f"{self.config.name}: {bias} is not supported in a {self.config.architecture} model",
                )
                del shapes[bias]
            shapes[name] = shape
        return shapes


def linear_names(index: int) -> list[str]:
    """The linear layers of a decoder layer, as checkpoints name them."""
    return [name for names in fused_names(index).values() for name in names]


def fused_names(index: int) -> dict[str, list[str]]:
    """Of each projection of `DecoderLayer`, the checkpoint's layers that it holds."""
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    return {
        "qkv_proj": [f"{attention}.{kind}_proj" for kind in "qkv"],
        "o_proj": [f"{attention}.o_proj"],
        "gate_up_proj": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        "down_proj": [f"{mlp}.down_proj"],
    }


def is_quantized(name: str) -> bool:
    """Is this tensor the weight of a linear layer inside of the decoder? (The embedding and the head stay.)"""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def is_quantized_folder(folder: Path) -> bool:
    """Does the folder's description name a quantisation of whatever kind?"""
    config = folder / "config.json"
    return (folder / "quantize_config.json").is_file() or (
        config.is_file() and "quantization_config" in read_json(config)
    )


def _quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the quantisation: in config.json, or, in older folders, in a file of its own."""
    options: Any = config.get("quantization_config")
    path = folder / "quantize_config.json"
    if options is None and path.is_file():
        options = read_json(path)
    if not isinstance(options, Mapping):
        raise UserError(f"{folder} is not quantised: config.json has no quantization_config, nor is there {path.name}")
    return cast(Mapping[str, Any], options)
