"""Flash-Decoding over a paged cache: one query token a sequence, and every context cut into parts (`triton_parts`).

A program reads one part of one sequence's context for one KV head and serves all query heads that share it (they are
the rows of its matrix product, padded to the 16 rows that a tensor core wants: the arithmetic is free, the reading
is not).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.launch import launch_options
from stages.m4_flash_attention.fast.kernels.triton_config import MANY, Config, choose, decode_config
from stages.m4_flash_attention.fast.kernels.triton_parts import Workspace, find_part, finish, num_sms, padded_count
from stages.m4_flash_attention.fast.kernels.triton_prefill import attend_tiles

# pyright: basic

PROGRAMS_PER_SM = 4
MERGED = 4096
"""How many numbers of the parts' acc are merged at a time."""
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_seqs", "table_stride"], do_not_specialize_on_alignment=["tables", "seq_lens"])
def decode_kernel(
    q, keys, values, tables, seq_lens, out, part_acc, part_l, part_m, arrived, scale, num_seqs,
    q_stride, table_stride, block_stride, slot_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SEQS: tl.constexpr, TARGET: tl.constexpr, MERGED_ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    head, heads = tl.program_id(0), tl.num_programs(0)
    index = tl.arange(0, SEQS)
    lengths = tl.load(seq_lens + index, mask=index < num_seqs, other=0)  # written before the step began
    rows = (index < num_seqs).to(tl.int32)
    sequence, part, count, tiles, first_part = find_part(rows, tl.cdiv(lengths, TILE), tl.program_id(1), TARGET)
    if sequence >= num_seqs:
        return
    first = part * tiles * TILE
    last = tl.minimum(first + tiles * TILE, tl.load(seq_lens + sequence))
    if PDL:
        gdc_wait()

    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    in_group = row < GROUP
    query_head = head * GROUP + row
    q_at = sequence.to(tl.int64) * q_stride + query_head[:, None] * DIM + column[None, :]
    queries = tl.load(q + q_at, mask=in_group[:, None], other=0.0)

    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    acc, l, m = attend_tiles(
        acc, l, m, queries, tl.full([1], last - 1, tl.int32), keys + head * DIM, values + head * DIM,
        tables + sequence * table_stride, first, last, last, scale, block_stride, slot_stride, DIM, BLOCK, TILE,
        PRECISION,
    )  # fmt: skip

    out += (sequence.to(tl.int64) * heads + head) * GROUP * DIM
    finish(
        acc, l, m, out, DIM, GROUP, part_acc, part_l, part_m, arrived, first_part, part, count, head, heads, GROUP,
        ROWS, MERGED_ROWS, DIM, AT_ONCE,
    )  # fmt: skip


class DecodeKernel:
    """The kernel, and the place for its parts."""

    def __init__(self, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kind = head_dim, dtype
        self._launch, self._programs = launch_options(device), num_sms(device) / num_kv_heads
        most = max(self.target(choose(MANY, *self._kind)), self.target(decode_config(*self._kind, sequences=1)))
        self.workspace = Workspace(most, num_kv_heads, group, head_dim, device)

    def target(self, config: Config) -> int:
        """Parts of all contexts together."""
        return max(1, int(self._programs * config.get("PER_SM", PROGRAMS_PER_SM)))

    def __call__(
        self, q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor
    ) -> None:
        """q [B, Hq, D] (rows may lie apart), kv one layer [2, N, block_size, Hkv, D], tables [B, M], seq_lens [B],
        out [B, Hq, D] contiguous."""
        batch, heads, dim = q.shape
        block_size, kv_heads = kv.shape[2], kv.shape[3]
        config, group = decode_config(*self._kind, sequences=batch), heads // kv_heads
        target, merged = self.target(config), triton.next_power_of_2(group)
        kernel: Any = decode_kernel[(kv_heads, target + batch)]
        kernel(
            q, kv[0], kv[1], tables, seq_lens, out, *self.workspace.tensors(), dim**-0.5 * LOG2E, batch, q.stride(0),
            tables.stride(0), kv.stride(1), kv.stride(2), GROUP=group, ROWS=max(16, merged), DIM=dim, BLOCK=block_size,
            SEQS=padded_count(batch), TARGET=target, MERGED_ROWS=merged, AT_ONCE=max(1, MERGED // (merged * dim)),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # means something in float32 only
            TILE=config["TILE"], num_warps=config["num_warps"], num_stages=config["num_stages"], **self._launch,
        )  # fmt: skip
