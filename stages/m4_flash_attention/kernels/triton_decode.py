"""Flash-Decoding over a paged cache: one query token a sequence, each context cut into `num_splits` parts.

A program reads one part of one sequence's context for one KV head and serves all query heads that share it (they are
the rows of its matrix product, padded to the 16 rows that a tensor core wants: the arithmetic is free, the reading
is not). The lengths are read on the device and the grid does not depend on them, so one CUDA graph serves every step:
captured for the longest context, it has programs to spare for a short one, and those leave at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.launch import launch_options
from stages.m4_flash_attention.kernels.triton_config import decode_config

# pyright: basic

MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_splits", "table_stride"], do_not_specialize_on_alignment=["tables", "seq_lens"])
def decode_kernel(
    q, keys, values, tables, seq_lens, out, part_out, part_top, part_weight, scale, num_splits,
    q_stride, table_stride, block_stride, slot_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)  # stands there since the step began
    share = tl.cdiv(tl.cdiv(length, TILE), num_splits) * TILE  # whole tiles for each part
    first = split * share
    last = tl.minimum(first + share, length)
    if SPLIT:  # noqa: SIM102 (the compiler knows one condition, the GPU the other)
        if first >= length:  # a context shorter than the one that the grid was made for: the reduction knows
            return
    if EARLY:
        gdc_wait()

    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    in_group = row < GROUP
    query_head = head * GROUP + row
    q_at = sequence.to(tl.int64) * q_stride + query_head[:, None] * DIM + column[None, :]
    queries = tl.load(q + q_at, mask=in_group[:, None], other=0.0)

    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        valid = position < last
        block = tl.load(tables + sequence * table_stride + position // BLOCK, mask=valid, other=0).to(tl.int64)
        at = block * block_stride + (position % BLOCK) * slot_stride + head * DIM
        key = tl.load(keys + at[None, :] + column[:, None], mask=valid[None, :], other=0.0)  # [DIM, TILE]
        value = tl.load(values + at[:, None] + column[None, :], mask=valid[:, None], other=0.0)  # [TILE, DIM]
        scores = tl.dot(queries, key, input_precision=PRECISION) * scale
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top

    heads = tl.num_programs(0) * GROUP
    out_row = sequence.to(tl.int64) * heads + query_head
    if SPLIT:
        part = out_row * num_splits + split
        tl.store(part_top + part, top, mask=in_group)
        tl.store(part_weight + part, weight, mask=in_group)
        tl.store(part_out + part[:, None] * DIM + column[None, :], sums, mask=in_group[:, None])
    else:
        result = sums / tl.where(weight > 0, weight, 1.0)[:, None]  # a padded row has no tokens: 0, not NaN
        result = result.to(out.dtype.element_ty)
        tl.store(out + out_row[:, None] * DIM + column[None, :], result, mask=in_group[:, None])


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["seq_lens"])
def reduce_kernel(
    part_out, part_top, part_weight, seq_lens, out, heads, num_splits, DIM: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + row // heads)
    share = tl.cdiv(tl.cdiv(length, TILE), num_splits) * TILE
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM)
    exists = split * share < length  # the others have written nothing
    part = row * num_splits + split
    if EARLY:
        gdc_wait()
    top = tl.load(part_top + part, mask=exists, other=-1e30)
    factor = tl.exp2(top - tl.max(top, 0))  # all parts to one maximum
    weight = tl.sum(tl.load(part_weight + part, mask=exists, other=0.0) * factor, 0)
    sums = tl.load(part_out + part[:, None] * DIM + column[None, :], mask=exists[:, None], other=0.0)
    result = tl.sum(sums * factor[:, None], 0) / tl.where(weight > 0, weight, 1.0)
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty))


class DecodeKernel:
    """The two kernels and their workspace, allocated once: a CUDA graph keeps its address.

    `programs`: how many programs fill the GPU. A batch that has fewer is split further, up to `MAX_SPLITS` parts a
    sequence; the rule looks at the batch's size and at `max_seq_len`, never at a length on the device.
    """

    def __init__(self, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = decode_config(head_dim, dtype)
        self._launch = launch_options(device)
        interpreted = device.type == "cpu"
        processors = 2 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count
        self.programs = processors * PROGRAMS_PER_SM
        rows = max(self.programs, num_kv_heads) * group
        self._sums = torch.empty(rows, head_dim, dtype=torch.float32, device=device)
        self._tops = torch.empty(rows, dtype=torch.float32, device=device)
        self._weights = torch.empty(rows, dtype=torch.float32, device=device)

    def num_splits(self, batch_size: int, num_kv_heads: int, max_seq_len: int) -> int:
        wanted = self.programs // (batch_size * num_kv_heads)
        return max(1, min(wanted, MAX_SPLITS, -(-max_seq_len // self.config["TILE"])))

    def __call__(
        self, q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor, max_seq_len: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """q [B, Hq, D] (rows may lie apart), kv one layer [2, N, block_size, Hkv, D], out [B, Hq, D] contiguous."""
        batch, heads, dim = q.shape
        block_size, kv_heads = kv.shape[2], kv.shape[3]
        group = heads // kv_heads
        splits = self.num_splits(batch, kv_heads, max_seq_len)
        precision = "ieee" if q.dtype == torch.float32 else "tf32"  # means something in float32 only
        grid: Any = decode_kernel[(kv_heads, batch, splits)]
        grid(
            q, kv[0], kv[1], tables, seq_lens, out, self._sums, self._tops, self._weights, dim**-0.5 * LOG2E, splits,
            q.stride(0), tables.stride(0), kv.stride(1), kv.stride(2),
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, BLOCK=block_size, SPLIT=splits > 1,
            PRECISION=precision, **self.config, **self._launch,
        )  # fmt: skip
        if splits > 1:
            reduce: Any = reduce_kernel[(batch * heads,)]
            reduce(
                self._sums, self._tops, self._weights, seq_lens, out, heads, splits, DIM=dim,
                TILE=self.config["TILE"], SPLITS=triton.next_power_of_2(splits), **self._launch,
            )  # fmt: skip
