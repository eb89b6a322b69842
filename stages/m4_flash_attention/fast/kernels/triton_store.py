"""New keys and values into their slots: one program a token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.execution.gpu.triton_elementwise import wait

# pyright: basic


@triton.jit
def store_kernel(
    k, v, keys, values, slots, k_stride, v_stride, slot_stride, ROW: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    wait(PDL)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < ROW
    tl.store(keys + slot * slot_stride + column, tl.load(k + token * k_stride + column, mask=inside), mask=inside)
    tl.store(values + slot * slot_stride + column, tl.load(v + token * v_stride + column, mask=inside), mask=inside)


def store(kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, launch: dict[str, Any]) -> None:
    """k, v [T, Hkv, D] (rows may lie apart) into one layer's kv [2, num_blocks, block_size, Hkv, D].
    launch: of `common.execution.gpu.launch`."""
    row = k.shape[1] * k.shape[2]
    kernel: Any = store_kernel[(k.shape[0],)]
    padded = triton.next_power_of_2(row)
    kernel(k, v, kv[0], kv[1], slots, k.stride(0), v.stride(0), kv.stride(2), row, padded, **launch)
