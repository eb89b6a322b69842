"""Reads folders that transformers writes with bitsandbytes in NF4: safetensors in which a linear layer's `weight` holds
packed codes, with `weight.absmax`, `weight.quant_map` and a description next to it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from common.errors import refusing, require
from common.models.sources.gptq_checks import LARGEST_WEIGHT
from common.models.sources.nf4 import BLOCK, STATE, NF4Weight, table
from common.models.sources.quantized_folder import AGAIN, HEAD, QuantizedFolder, linear_names, quantization
from common.models.weights import Shape, tensor_shapes

SHIFT = 0.2  # Mean of the values by which scales are multiplied that must be wrong: in SmolLM2 it is at most 0.004
ZERO = 7  # The code of 0
ZERO_BLOCKS = 0.5  # Share of blocks of nothing but zeros that must be wrong: a model may have dead outputs
SMALLEST = 1e-38  # A scale below it was no divisor: the block's codes say nothing
NESTED_BLOCK = 256  # Scales that share a scale of their own, with double quantisation


class NF4Folder(QuantizedFolder):
    """Layers that `llm_int8_skip_modules` names are not quantised; others are in NF4."""

    mark = STATE

    def _understand(self, label: str, description: Mapping[str, Any]) -> None:
        self.double = check_description(label, description)

    @property
    def note(self) -> str:
        return f"dequantised at load from NF4, blocks of {BLOCK}: no bytes are saved"

    def quantized(self, name: str) -> NF4Weight:
        self.check()
        label, (rows, columns) = f"{self.config.name}: {name}", tensor_shapes(self.config)[f"{name}.weight"]
        names = {kind: f"{name}.{kind}" for kind in stored_shapes(rows, columns, self.double)}
        parts = {kind: self._files[part].get_tensor(part) for kind, part in names.items()}
        check_parts(label, parts, (rows, columns), self.double)
        bias = f"{name}.bias"
        return NF4Weight.from_parts(parts, rows, self.read(bias, (rows,)) if bias in self._files else None)

    def _check_first_layer(self) -> None:
        for name in linear_names(0):
            if self.has(name):
                self.quantized(name)

    def _stored_shapes(self, base: str, shape: Shape, found: Mapping[str, Shape]) -> tuple[str, dict[str, Shape]]:
        weight = f"{base}.weight"
        if (found.get(weight) == shape or base == HEAD) and not any(part.startswith(f"{weight}.") for part in found):
            return "", {}
        wrong = f"{self.config.name}: {base} has {shape[1]} inputs, no multiple of {BLOCK}"
        require(shape[1] % BLOCK == 0, f"{wrong}: take the model that is not quantised")
        return "in NF4", stored_shapes(shape[0], shape[1], self.double)


def is_bitsandbytes_folder(folder: Path) -> bool:
    """Did bitsandbytes quantise the model, in whatever way?"""
    found = quantization(folder)
    options: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    method, bits = options.get("quant_method"), options.get("load_in_4bit") or options.get("load_in_8bit")
    return method == "bitsandbytes" or bool(not method and bits)


def check_description(label: str, options: Mapping[str, Any]) -> bool:
    """Are scales quantised once more, by `quantization_config`? `UserError` if it does not describe NF4."""
    hint = "supported is NF4, load_in_4bit with bnb_4bit_quant_type 'nf4'. Take the model that is not quantised"
    require(not options.get("load_in_8bit"), f"{label}: load_in_8bit (LLM.int8) is not supported: {hint}")
    require(options.get("load_in_4bit") is True, f"{label}: load_in_4bit is not true: {hint}")
    kind = options.get("bnb_4bit_quant_type") or "fp4"  # transformers' default
    require(kind == "nf4", f"{label}: bnb_4bit_quant_type {kind!r:.80} is not supported: {hint}")
    storage = options.get("bnb_4bit_quant_storage") or "uint8"
    require(storage == "uint8", f"{label}: bnb_4bit_quant_storage {storage!r:.80} is not supported: 'uint8' is")
    double = options.get("bnb_4bit_use_double_quant") or False
    require(isinstance(double, bool), f"{label}: bnb_4bit_use_double_quant={double!r:.80} is neither true nor false")
    return double


def stored_shapes(rows: int, columns: int, double: bool) -> dict[str, Shape]:
    """Names and shapes of the tensors that stand for a weight [rows, columns]; the description is of any length."""
    blocks = rows * columns // BLOCK
    shapes = {"weight": (blocks * BLOCK // 2, 1), "weight.absmax": (blocks,), "weight.quant_map": (16,), STATE: (-1,)}
    if double:
        shapes |= {"weight.nested_absmax": (-(-blocks // NESTED_BLOCK),), "weight.nested_quant_map": (256,)}
    return shapes


def check_parts(label: str, parts: dict[str, torch.Tensor], shape: Shape, double: bool) -> None:
    """`UserError` unless these are the tensors of an NF4 weight; quantised scales become float32, in place."""
    state = _state(label, parts[STATE])
    wanted = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    for word, value in wanted.items():
        found = state.get(word)
        require(found == value, f"{label}: its description says {word} {found!r:.80}, not {value!r}: {AGAIN}")
    whole = ("weight", STATE, "weight.absmax") if double else ("weight", STATE)
    for kind, part in parts.items():
        dtype = torch.uint8 if kind in whole else torch.float32
        require(part.dtype == dtype, f"{label}.{kind} holds {part.dtype}, not {dtype}: it is mislabelled; {AGAIN}")
    same = torch.allclose(parts["weight.quant_map"], table(torch.device("cpu")), rtol=0, atol=1e-5)
    require(same, f"{label}.weight.quant_map does not hold the values of NF4 (of FP4?): {AGAIN}")
    if double:
        steps = parts["weight.nested_quant_map"]
        ordered = bool((steps.diff() >= 0).all()) and float(steps[0]) < float(steps[-1]) <= 1
        require(ordered, f"{label}.weight.nested_quant_map is no list of growing steps up to 1: {AGAIN}")
        offset = state.get("nested_offset")
        known = isinstance(offset, float) and state.get("nested_blocksize") == NESTED_BLOCK
        require(known, f"{label}: its description lacks nested_offset, or nested_blocksize {NESTED_BLOCK}: {AGAIN}")
        steps = parts["weight.nested_quant_map"][parts["weight.absmax"].int()]
        nested = parts["weight.nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(steps)]
        parts["weight.absmax"] = steps * nested + cast(float, offset)
    scales = parts["weight.absmax"]
    largest = float(scales.abs().max())
    require(math.isfinite(largest), f"{label}.weight.absmax is not finite: {AGAIN}")
    require(largest <= LARGEST_WEIGHT, f"{label}.weight.absmax stands for weights of up to {largest:.0f}: {AGAIN}")
    # Double quantisation may round the scale of a block of zeros to something below 0.
    require(double or bool((scales >= 0).all()), f"{label}.weight.absmax is negative: {AGAIN}")
    check_codes(label, parts["weight"].view(-1, BLOCK // 2), scales)


def check_codes(label: str, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """`UserError` if codes [blocks, 32] and scales cannot be a linear layer's: its weights lie around 0, few of its
    blocks hold nothing but zeros, their scales differ, and the largest of a block, by which the others were divided,
    has the code of 1 or -1."""
    high, low = packed >> 4, packed & 15
    nothing = ((high == ZERO) & (low == ZERO)).all(1) | (scales.abs() < SMALLEST)
    require(float(nothing.float().mean()) < ZERO_BLOCKS, f"{label} is all but empty: {AGAIN}")
    alike = len(scales) > 1 and float(scales.min()) == float(scales.max())
    require(not alike, f"{label}.weight.absmax is the same in all blocks: {AGAIN}")
    largest = ((high == 0) | (high == 15) | (low == 0) | (low == 15)).any(1)
    values = table(packed.device)
    mean = float(values[high.int()].mean() + values[low.int()].mean()) / 2
    right = bool((largest | nothing).all()) and abs(mean) < SHIFT
    require(right, f"{label}.weight holds codes that no rounding gives: {AGAIN}")


def _state(label: str, part: torch.Tensor) -> Mapping[str, Any]:
    require(part.numel() < 4096, f"{label}.{STATE} has {part.numel()} bytes: {AGAIN}")
    with refusing(f"{label}.{STATE}"):
        state = json.loads(bytes(part.tolist()))
    require(isinstance(state, dict), f"{label}.{STATE} is no JSON object: {AGAIN}")
    return state
