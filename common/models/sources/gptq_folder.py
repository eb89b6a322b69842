"""Reads folders in the format of AutoGPTQ and its successor GPTQModel: safetensors in which a linear layer's `weight`
is replaced by `qweight`, `qzeros`, `scales` and `g_idx`, and a description of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch

from common.errors import require
from common.models.quantized_weight import BITS, PER_CHANNEL, WORD, Format, QuantizedWeight, unpack_zeros
from common.models.sources.gptq_checks import check_numbers, check_version
from common.models.sources.quantized_folder import QuantizedFolder, is_quantized, linear_names
from common.models.weights import Shape, tensor_shapes

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
    def from_dict(cls, name: str, options: Mapping[str, Any]) -> Self:
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


class GPTQFolder(QuantizedFolder):
    """The zero points of its first layer are checked to be stored as the description says."""

    mark = "qweight"

    def _understand(self, label: str, description: Mapping[str, Any]) -> str:
        self.stored = Stored.from_dict(label, description)
        return f"with bits={self.stored.bits} and group_size={self.stored.group_size}"

    @property
    def note(self) -> str:
        stored = self.stored
        group = "one group per output" if stored.group_size == PER_CHANNEL else f"groups of {stored.group_size}"
        return f"dequantised at load from {stored.bits}-bit GPTQ, {group}: no bytes are saved"

    def quantized(self, name: str) -> QuantizedWeight:
        self.check()
        weight = self._read_quantized(name)
        check_numbers(f"{self.config.name}: {name}", weight, self.stored.symmetric)
        return weight

    def _check_first_layer(self) -> None:
        first = [self._read_quantized(name) for name in linear_names(0)]
        check_version(self.config.name, first, self.stored.symmetric, self.stored.form)
        for name, weight in zip(linear_names(0), first, strict=True):
            check_numbers(f"{self.config.name}: {name}", weight, self.stored.symmetric)

    def _read_quantized(self, name: str) -> QuantizedWeight:
        kinds = [*PARTS, "bias"] if f"{name}.bias" in tensor_shapes(self.config) else PARTS
        files = {kind: self._files[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in self._files}
        parts = {kind: file.get_tensor(f"{name}.{kind}") for kind, file in files.items()}
        return from_parts(f"{self.config.name}: {name}", parts, self.stored)

    def _stored_shapes(self, base: str, shape: Shape, found: Mapping[str, Shape]) -> dict[str, Shape]:
        wanted = self.stored.shapes(*shape)
        if f"{base}.g_idx" not in found and not self.stored.desc_act:  # some writers leave out what says nothing
            del wanted["g_idx"]
        return wanted

    def _plain_shapes(self, found: dict[str, Shape]) -> dict[str, Shape]:
        shapes, plain = super()._plain_shapes(found), tensor_shapes(self.config)
        for bias in [name.replace(".weight", ".bias") for name in plain if is_quantized(name)]:
            if bias in shapes and bias not in plain:  # AutoGPTQ writes zeros where the model has no bias
                zeros = not bool(self._files[bias].get_tensor(bias).any())
                model = f"a {self.config.architecture} model"
                require(zeros, f"{self.config.name}: {bias} is not supported in {model}")
                del shapes[bias]
        return shapes


def from_parts(label: str, parts: Mapping[str, torch.Tensor], stored: Stored) -> QuantizedWeight:
    """The weight that tensors of these kinds stand for; `UserError` for wrong dtypes, or groups that do not exist."""
    for kind in ("qweight", "qzeros"):
        dtype = parts[kind].dtype
        require(dtype == torch.int32, f"{label}.{kind} holds {dtype}, not int32: it is mislabelled")
    scales, g_idx = parts["scales"], parts.get("g_idx")
    require(scales.is_floating_point(), f"{label}.scales hold {scales.dtype}, no floating point: download it again")
    weight = QuantizedWeight(
        qweight=parts["qweight"],
        scales=scales,
        zeros=unpack_zeros(parts["qzeros"], stored.bits, stored.form),
        g_idx=None,
        bits=stored.bits,
        group_size=stored.group_of(parts["qweight"].shape[0] * WORD // stored.bits),
        bias=parts.get("bias"),
    )
    if g_idx is not None:
        require(not g_idx.is_floating_point(), f"{label}.g_idx holds {g_idx.dtype}, no integers: download it again")
        g_idx = g_idx.to(torch.int32)
        within = int(g_idx.min()) >= 0 and int(g_idx.max()) < weight.groups
        require(within, f"{label}.g_idx names groups outside of 0 to {weight.groups - 1}: the file is damaged")
        weight.g_idx = None if torch.equal(g_idx.long(), weight.group_index()) else g_idx
    return weight
