"""Parts of one softmax, put together: the end of both split kernels, decode's and prefill's.

Whoever computes a part of a row's keys leaves its largest score, its weight (the sum of its exponentials) and its sums
of values. A part of weight 0 had no keys, and has left nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# pyright: basic


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["out"])
def merge_kernel(
    part_out, part_top, part_weight, out, num_splits, DIM: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM)
    part = row * num_splits + split
    weight = tl.load(part_weight + part, mask=split < num_splits, other=0.0)
    top = tl.load(part_top + part, mask=split < num_splits, other=0.0)
    exists = weight > 0
    top = tl.where(exists, top, -1e30)
    factor = tl.where(exists, tl.exp2(top - tl.max(top, 0)), 0.0)  # all parts to one maximum
    total = tl.sum(tl.where(exists, weight, 0.0) * factor, 0)
    sums = tl.load(part_out + part[:, None] * DIM + column[None, :], mask=exists[:, None], other=0.0)
    result = tl.sum(sums * factor[:, None], 0) / tl.where(total > 0, total, 1.0)  # a padded row has no keys: 0, not NaN
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty))


class Parts:
    """The workspace, allocated once: a CUDA graph keeps its address. Decodes and chunks use it one after the other.

    Part p of row r (row: token * heads + head) stands at r * num_splits + p. `count`: how many there may be.
    """

    def __init__(self, count: int, head_dim: int, device: torch.device) -> None:
        self.sums = torch.empty(count, head_dim, dtype=torch.float32, device=device)
        self.tops = torch.empty(count, dtype=torch.float32, device=device)
        self.weights = torch.empty(count, dtype=torch.float32, device=device)

    def merge(self, out: torch.Tensor, num_splits: int) -> None:
        """out [T, Hq, D], contiguous."""
        tokens, heads, dim = out.shape
        kernel: Any = merge_kernel[(tokens * heads,)]
        kernel(self.sums, self.tops, self.weights, out, num_splits, DIM=dim, SPLITS=triton.next_power_of_2(num_splits))
