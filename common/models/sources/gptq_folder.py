"""Reads folders in the format of AutoGPTQ and its successor GPTQModel: safetensors in which a linear layer's `weight`
is replaced by `qweight`, `qzeros`, `scales` and `g_idx`, and a description of them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import require
from common.models.quantized_weight import PER_CHANNEL, WORD, QuantizedWeight, unpack_zeros
from common.models.sources.gptq_checks import check_numbers, check_version
from common.models.sources.gptq_description import Description, Stored
from common.models.sources.hf_folder import WEIGHTS
from common.models.sources.quantized_folder import HEAD, OLDER_FILE, QuantizedFolder, is_quantized, linear_names
from common.models.weights import Part, Shape, tensor_shapes
from common.text.json_file import read_json

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GPTQFolder(QuantizedFolder):
    """The zero points of its first layer are checked to be stored as the description says."""

    mark = "qweight"

    def _understand(self, label: str, description: Mapping[str, Any]) -> None:
        self.described = Description(label, description)
        self.stored = self.described.base
        older = read_json(self.folder / OLDER_FILE, missing={})
        name = self.described.file_name or older.get("model_file_base_name")
        self.weights = _weights_name(self.folder, name, f"gptq_model-{self.stored.bits}bit-{self.stored.group_size}g")

    @property
    def note(self) -> str:
        stored = self.stored
        group = "one group per output" if stored.group_size == PER_CHANNEL else f"groups of {stored.group_size}"
        return f"dequantised at load from {stored.bits}-bit GPTQ, {group}: no bytes are saved"

    def quantized(self, name: str, part: Part = ()) -> QuantizedWeight:
        """Of a part, only the codes that it holds are read from the file."""
        self.check()
        label = f"{self.config.name}: {name}"
        weight = self._read_quantized(name).part(part, label)
        check_numbers(label, weight, self._stored(name).symmetric)
        return weight

    def _stored(self, name: str) -> Stored:
        stored = self.described.of(name)
        where = "dynamic says that it is not quantised: correct config.json"
        require(stored is not None, f"{self.config.name}: {name} has a {self.mark}, but {where}")
        return stored or self.stored

    def _check_first_layer(self) -> None:
        layers = [linear_names(index) for index in range(self.config.num_layers)]
        first = next((found for names in layers if (found := [name for name in names if self.has(name)])), [])
        missing = not first and any(self.described.of(name) for names in layers for name in names)
        require(not missing, f"{self.folder} is said to be quantised, but no layer in {self.weights}.safetensors is")
        alike: dict[Stored, list[QuantizedWeight]] = {}
        for name in first:
            alike.setdefault(self._stored(name), []).append(self._read_quantized(name))
        for stored, weights in alike.items():
            check_version(self.config.name, weights, stored.symmetric, stored.form)
        for name in first:
            self.quantized(name)

    def _read_quantized(self, name: str) -> QuantizedWeight:
        names = {kind: f"{name}.{kind}" for kind in PARTS if f"{name}.{kind}" in self._files}
        parts = {kind: self._files[part].get_tensor(part) for kind, part in names.items()}
        bias = tensor_shapes(self.config).get(f"{name}.bias")
        if bias is not None:
            parts["bias"] = self.read(f"{name}.bias", bias)
        return from_parts(f"{self.config.name}: {name}", parts, self._stored(name))

    def _stored_shapes(self, base: str, shape: Shape, found: Mapping[str, Shape]) -> tuple[str, dict[str, Shape]]:
        if not any(f"{base}.{kind}" in found for kind in PARTS) and (base == HEAD or f"{base}.weight" in found):
            return "", {}
        stored = self._stored(base)
        wanted = stored.shapes(*shape)
        if f"{base}.g_idx" not in found and not stored.desc_act:  # some writers leave out what says nothing
            del wanted["g_idx"]
        return f"with bits={stored.bits} and group_size={stored.group_size}", wanted

    def _plain_shapes(self, found: dict[str, Shape]) -> dict[str, Shape]:
        shapes, plain = super()._plain_shapes(found), tensor_shapes(self.config)
        linear = [name.removesuffix(".weight") for name in plain if is_quantized(name)]
        for bias in [f"{name}.bias" for name in (*linear, HEAD)]:
            if bias in shapes and bias not in plain:  # AutoGPTQ writes zeros where the model has no bias
                wrong = f"{bias} is not supported in a {self.config.architecture} model"
                require(not self._files[bias].get_tensor(bias).any(), f"{self.config.name}: {wrong}")
                del shapes[bias]
        return shapes


def _weights_name(folder: Path, said: object, usual: str) -> str:
    """Of weight files, in front of `.safetensors`: as said, as transformers', as AutoGPTQ's, or the only one's."""
    here = {path.name.removesuffix(".index.json") for path in folder.iterdir()}
    found = sorted(name.removesuffix(WEIGHTS) for name in here if re.search(r"(?<!-of-\d{5})\.safetensors$", name))
    inside = not said or (isinstance(said, str) and not {"/", "\\"} & set(said))
    require(inside, f"{folder}: model_file_base_name={said!r:.80} is no name of a file in this folder")
    known = [name for name in (str(said).removesuffix(WEIGHTS), "model", usual) if name in found]
    hint = "say which as model_file_base_name"
    require(len(found) < 2 or bool(known), f"{folder} has several weight files, {found!r:.80}: {hint}")
    return (known or found or ["model"])[0]


def from_parts(label: str, parts: Mapping[str, torch.Tensor], stored: Stored) -> QuantizedWeight:
    """The weight that tensors of these kinds stand for; `UserError` for wrong dtypes, or groups that do not exist."""
    for kind in ("qweight", "qzeros"):
        dtype = parts[kind].dtype
        require(dtype == torch.int32, f"{label}.{kind} holds {dtype}, not int32: it is mislabelled")
    scales, g_idx = parts["scales"], parts.get("g_idx")
    floats = scales.is_floating_point() and scales.itemsize > 1
    require(floats, f"{label}.scales hold {scales.dtype}, no floating point: download it again")
    zeros = unpack_zeros(parts["qzeros"], stored.bits, stored.form)
    group_size = stored.group_of(parts["qweight"].shape[0] * WORD // stored.bits)
    weight = QuantizedWeight(parts["qweight"], scales, zeros, None, stored.bits, group_size, parts.get("bias"))
    if g_idx is not None:
        whole = g_idx.dtype in (torch.int32, torch.int64)
        require(whole, f"{label}.g_idx holds {g_idx.dtype}, no integers: download it again")
        within = int(g_idx.min()) >= 0 and int(g_idx.max()) < weight.groups
        require(within, f"{label}.g_idx names groups outside of 0 to {weight.groups - 1}: the file is damaged")
        weight.g_idx = None if torch.equal(g_idx.long(), weight.group_index()) else g_idx.int()
    return weight
