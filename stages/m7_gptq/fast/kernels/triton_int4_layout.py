"""A 4-bit weight as the Triton kernels want it.

Its rows are outputs, each cut into blocks of 128 inputs, which are 16 words of 32 bits:

    word j of a block holds inputs  j, 16 + j, 32 + j, ... 112 + j    (lowest four bits first)

so that *plane* p, the p-th four bits of a block's words, is 16 inputs that lie side by side in x too: a kernel takes a
tile of words apart by one mask for each plane, and never has to move a number from thread to thread. A group of the
checkpoint is some whole planes (32 inputs are 2, 64 are 4), one block, or `share` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.models.quantized_weight import QuantizedWeight, pack

BLOCK = 128


@dataclass
class TritonWeight:
    """words: int32 [out, 16 * blocks], inputs padded to whole blocks; scales, zeros: [out, groups].
    zeros are 16-bit numbers, as x is: where 8-bit ones are mixed in, Triton's operands take more instructions.

    split: groups of one block, 1, 2 or 4; share: blocks of one group. One of the two is 1.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None
    in_features: int
    split: int
    share: int

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def blocks(self) -> int:
        return self.words.shape[1] // 16

    def nbytes(self) -> int:
        tensors = (self.words, self.scales, self.zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def takes(weight: QuantizedWeight) -> bool:
    """Groups of 32 or 64 inputs, of whole blocks, or whole rows; multiples of 64 outputs."""
    groups = weight.group_size in (32, 64) or weight.group_size % BLOCK == 0 or weight.groups == 1
    return weight.bits == 4 and groups and weight.out_features % 64 == 0


def lay_out(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> TritonWeight:
    """From the checkpoint's layout; the weight must be one that it `takes`, without a `g_idx`."""
    inputs, outputs = weight.in_features, weight.out_features
    blocks = -(-inputs // BLOCK)
    codes = weight.codes().to(device)
    padding = torch.zeros(blocks * BLOCK - inputs, outputs, dtype=codes.dtype, device=device)
    padded = torch.cat((codes, padding)).view(blocks, 8, 16, outputs)  # plane, then word
    words = pack(padded.transpose(1, 2).reshape(-1, outputs), 4).T.contiguous()
    split = BLOCK // weight.group_size if weight.group_size < BLOCK and weight.groups > 1 else 1
    share = 1 if split > 1 else blocks if weight.groups == 1 else weight.group_size // BLOCK
    groups = blocks * split if share == 1 else weight.groups
    missing = groups - weight.groups
    scales = torch.cat((weight.scales, weight.scales.new_zeros(missing, outputs))).T.contiguous().to(device)
    zeros = torch.cat((weight.zeros, weight.zeros.new_full((missing, outputs), 8))).T.contiguous().to(device, dtype)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return TritonWeight(words, scales, zeros, bias, inputs, split, share)
