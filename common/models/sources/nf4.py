"""One weight matrix in NF4, the 4-bit numbers of QLoRA (Dettmers et al., NeurIPS 2023), as bitsandbytes stores it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

BLOCK = 64
"""Weights that share a scale, as in QLoRA."""

STATE = "weight.quant_state.bitsandbytes__nf4"
"""The part of a stored layer that describes the others: JSON, as a tensor of bytes."""

VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 numbers of QLoRA's appendix E. These digits are what bitsandbytes multiplies by, whatever a file says; where
they come from: `nf4_values` in tests/m7/test_nf4.py."""


@dataclass
class NF4Weight:
    """A weight [out, in] as blocks of 64 codes: `weight[o, i] = VALUES[code[o, i]] * scales[o, i // 64]`.

    packed: uint8 [out, in / 2], two codes a byte, the first in the high half.
    scales: float32 [out, in / 64], the largest magnitude in each block ("absmax"). bias: [out] or None.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the numbers stand for: computed in float32, then rounded to `dtype`."""
        codes = torch.stack((self.packed >> 4, self.packed & 15), dim=-1).int()
        values = table(self.packed.device)[codes].view(*self.scales.shape, BLOCK)
        return values.mul_(self.scales[..., None]).flatten(1).to(dtype)

    def weights_bytes(self) -> int:
        """Bytes of codes, scales and bias."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def outputs(self, which: slice) -> NF4Weight:
        """Some of the outputs."""
        return NF4Weight(self.packed[which], self.scales[which], None if self.bias is None else self.bias[which])

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that stand for the layer's weight in a checkpoint, without its bias. Blocks go over the flattened
        weight; as 64 divides `in`, they are the rows' own."""
        rows, half = self.packed.shape
        # bitsandbytes dequantises to this dtype: with float32 it gets the numbers that we get.
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": [rows, half * 2]}
        return {
            "weight": self.packed.reshape(-1, 1),
            "weight.absmax": self.scales.flatten(),
            "weight.quant_map": table(torch.device("cpu")),
            STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_parts(cls, parts: Mapping[str, torch.Tensor], rows: int, bias: torch.Tensor | None) -> NF4Weight:
        """The inverse of `parts`, which are taken to be right."""
        return cls(parts["weight"].view(rows, -1), parts["weight.absmax"].view(rows, -1), bias)


def table(device: torch.device) -> torch.Tensor:
    """`VALUES` as float32 [16]."""
    return torch.tensor(VALUES, device=device)


def concatenate_nf4(weights: Sequence[NF4Weight]) -> NF4Weight:
    """One weight with the outputs of all, for layers of the same input; all of them have a bias, or none has."""
    biases = [weight.bias for weight in weights if weight.bias is not None]
    return NF4Weight(
        packed=torch.cat([weight.packed for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        bias=torch.cat(biases) if biases else None,
    )
