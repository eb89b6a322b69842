"""One weight matrix in 4 or 8 bits, in the layout of GPTQ checkpoints, and how numbers are packed into its words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch

from common.errors import require
from common.models.weights import Part

Format = Literal["gptq", "gptq_v2"]
"""How a checkpoint stores zero points: `gptq` (version 1) stores zero - 1, `gptq_v2` stores the zero itself."""

BITS = (4, 8)  # What a number may take
PER_CHANNEL = -1  # The group size that means one group for all inputs of an output, as in checkpoints
WORD = 32  # Bits of one int32: 8 numbers of 4 bits, or 4 of 8 bits, lie in it, the first in the lowest bits


@dataclass
class QuantizedWeight:
    """A weight [out, in] as whole numbers: `weight[o, i] = (code[i, o] - zeros[g, o]) * scales[g, o]`, g = group of i.

    qweight: int32 [in / 8, out] for 4 bits, [in / 4, out] for 8: the codes, packed along the input dimension.
    scales: [groups, out], a floating dtype. zeros: uint8 [groups, out], the true zero points, not packed.
    g_idx: int32 [in], the group of each input; None: input i is in group i // group_size.
    group_size: inputs of one group, positive; the last group may have fewer. bias: [out] or None.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    group_size: int
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0] * (WORD // self.bits)

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    def group_index(self) -> torch.Tensor:
        """The group of each input, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.qweight.device) // self.group_size

    def codes(self) -> torch.Tensor:
        """The whole numbers, uint8 [in, out]."""
        return unpack(self.qweight, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the numbers stand for: computed in float32, then rounded to `dtype`."""
        group = self.group_index()
        offset = self.codes().float() - self.zeros[group].float()
        return (offset * self.scales[group].float()).T.contiguous().to(dtype)

    def outputs(self, which: slice | torch.Tensor) -> Self:
        """Some of the outputs, or all in another order."""
        parts = {name: getattr(self, name)[:, which] for name in ("qweight", "scales", "zeros")}
        return replace(self, **parts, bias=None if self.bias is None else self.bias[which])

    def part(self, part: Part, label: str) -> Self:
        """Some outputs, or some inputs: along groups, which are made smaller where one of them is cut.
        `UserError`, with the label, where inputs are in no order that can be cut."""
        if len(part) < 2:
            some = self.outputs(*part) if part else self
            return replace(some, **{n: getattr(some, n).contiguous() for n in ("qweight", "scales", "zeros")})
        order = "inputs in act-order (desc_act) lie across the ranks of tensor_parallel_size"
        require(self.g_idx is None, f"{label}: {order}: take a checkpoint without it, or 1")
        first, end, _ = part[1].indices(self.in_features)
        count, size = WORD // self.bits, math.gcd(first, self.group_size)
        whole = first % count == end % count == 0
        require(whole, f"{label}: {first} inputs are no whole words of {count}: take fewer ranks")
        groups = torch.arange(first, end, size, device=self.scales.device) // self.group_size
        qweight = self.qweight[first // count : end // count].contiguous()
        return replace(self, qweight=qweight, scales=self.scales[groups], zeros=self.zeros[groups], group_size=size)

    def to(self, device: torch.device) -> Self:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def weights_bytes(self) -> int:
        """Bytes as a checkpoint has them: zero points packed, and the group index only where there is one."""
        zeros = -(-self.zeros.numel() * self.bits // 8)
        extra = sum(tensor.nbytes for tensor in (self.g_idx, self.bias) if tensor is not None)
        return self.qweight.nbytes + self.scales.nbytes + zeros + extra


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the outputs of all, for layers of the same input; None where groups, bits or biases differ."""
    first = weights[0]
    for other in weights[1:]:
        kinds = [(weight.bits, weight.group_size, weight.bias is None) for weight in (first, other)]
        if kinds[0] != kinds[1] or not torch.equal(other.group_index(), first.group_index()):
            return None
    biases = [weight.bias for weight in weights if weight.bias is not None]
    names = ("qweight", "scales", "zeros")
    parts = {name: torch.cat([getattr(weight, name) for weight in weights], dim=1) for name in names}
    return replace(first, **parts, bias=torch.cat(biases) if biases else None)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers of `bits` bits [n, m] to int32 words [n / (32 / bits), m], packed along the first dimension."""
    count = WORD // bits
    parts = codes.to(torch.int32).reshape(-1, count, codes.shape[1])
    words = torch.zeros_like(parts[:, 0])
    for i in range(count):
        words |= parts[:, i] << (bits * i)
    return words


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int32 words [w, m] to uint8 [w * 32 / bits, m]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    parts = (words[:, None] >> shifts[None, :, None]) & (2**bits - 1)
    return parts.to(torch.uint8).reshape(-1, words.shape[1])


def pack_zeros(zeros: torch.Tensor, bits: int, form: Format) -> torch.Tensor:
    """Zero points [groups, out] to a checkpoint's qzeros, int32 [groups, out * bits / 32], packed along the outputs."""
    words = pack(zeros.T.contiguous(), bits).T
    return (words if form == "gptq_v2" else words - _ones(bits)).contiguous()


def unpack_zeros(qzeros: torch.Tensor, bits: int, form: Format) -> torch.Tensor:
    """The inverse of `pack_zeros`: the true zero points, uint8 [groups, out].
    Version 1's missing one is added to the whole word, as GPTQModel does: that undoes a subtraction from the whole
    word even where a zero point of 0 borrowed from its neighbour."""
    words = qzeros if form == "gptq_v2" else qzeros + _ones(bits)
    return unpack(words.T.contiguous(), bits).T.contiguous()


def _ones(bits: int) -> int:
    """A word whose every number is 1."""
    return sum(1 << shift for shift in range(0, WORD, bits))
