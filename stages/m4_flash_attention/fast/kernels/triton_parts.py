"""Contexts cut into parts of about one size, for the kernels of decodes and of prompts alike.

What a part is follows from the whole batch: as many tiles of K and V as make `TARGET` parts of all the work together.
Thus a few queries over a long context keep every SM of the GPU busy, and so does one long context among short ones.
The parts are numbered through all sequences, and each program finds its own from the lengths, on the device: one CUDA
graph serves every step. Programs that find none leave at once. The program that finishes last, by a counter, puts the
parts of a context together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# pyright: basic


@triton.jit
def find_part(rows, context, number, TARGET: tl.constexpr):
    """The number-th part of all.

    rows, context: for each sequence, how many tiles of queries it has and how many tiles of keys those go through.
    TARGET: the number of parts aimed at; 0: nothing is cut. Returns the sequence (the vectors' length: there is no such
    part), which of its parts it is (those of its first tile of queries come first), the parts of one tile of queries,
    the tiles of keys in one part, and how many parts there are in front of the sequence's first, counting those of cut
    sequences only.
    """
    index = tl.arange(0, rows.shape[0])
    cuts = index * 0 + 1
    if TARGET > 0:
        share = tl.maximum(tl.cdiv(tl.sum(rows * context, 0), TARGET), 1)
        cuts = tl.maximum((context + share // 2) // share, 1)  # rounded: nothing is cut for the sake of a small rest
    parts = rows * cuts
    sequence = tl.sum((tl.cumsum(parts, 0) <= number).to(tl.int32), 0)
    before = index < sequence
    here = index == sequence
    count = tl.maximum(tl.sum(tl.where(here, cuts, 0), 0), 1)
    part = number - tl.sum(tl.where(before, parts, 0), 0)
    tiles = tl.cdiv(tl.sum(tl.where(here, context, 0), 0), count)
    cut_before = tl.sum(tl.where(before & (cuts > 1), parts, 0), 0)
    return sequence, part, count, tiles, cut_before


@triton.jit
def leave_part(
    acc, l, m, part_acc, part_l, part_m, arrived, first, part, head, heads, ROWS: tl.constexpr,
    ROOM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write down acc [ROOM, DIM], of which ROWS count. Returns how many parts of the same `first` were there before.
    first: the place of the first of them, part: how far behind it this one is."""
    row, column = tl.arange(0, ROOM), tl.arange(0, DIM)
    at = ((first + part) * heads + head) * ROWS + row
    tl.store(part_m + at, m, mask=row < ROWS)
    tl.store(part_l + at, l, mask=row < ROWS)
    tl.store(part_acc + at[:, None] * DIM + column[None, :], acc, mask=(row < ROWS)[:, None])
    tl.debug_barrier()  # all threads have written before one of them says so
    return tl.atomic_add(arrived + first * heads + head, 1, sem="acq_rel")


@triton.jit
def merge_parts(
    part_acc, part_l, part_m, arrived, first, count, head, heads, ROWS: tl.constexpr, ROOM: tl.constexpr,
    DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The parts first ... first + count - 1 of one head as one: acc [ROOM, DIM], of which ROWS count, and l."""
    tl.store(arrived + first * heads + head, 0)  # for the next layer
    row, column = tl.arange(0, ROOM), tl.arange(0, DIM)
    m = tl.full([ROOM], -1e30, tl.float32)
    l = tl.zeros([ROOM], tl.float32)
    acc = tl.zeros([ROOM, DIM], tl.float32)
    for start in range(0, count, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        at = ((first + part) * heads + head)[:, None] * ROWS + row[None, :]
        there = (part < count)[:, None] & (row < ROWS)[None, :]
        ms = tl.load(part_m + at, mask=there, other=-1e30, cache_modifier=".cg")
        ls = tl.load(part_l + at, mask=there, other=0.0, cache_modifier=".cg")
        at_sums = at[:, :, None] * DIM + column[None, None, :]
        several = tl.load(part_acc + at_sums, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(ms, 0))
        factor = tl.exp2(ms - m_new[None, :])  # all parts to one maximum
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(ls * factor, 0)
        acc = acc * shrink[:, None] + tl.sum(several * factor[:, :, None], 0)
        m = m_new
    return acc, l


@triton.jit
def write(acc, l, out, stride, real, ROOM: tl.constexpr, DIM: tl.constexpr):
    """acc / l, the first `real` rows, to rows of out that lie `stride` numbers apart."""
    row, column = tl.arange(0, ROOM)[:, None], tl.arange(0, DIM)[None, :]
    result = acc / tl.where(l > 0, l, 1.0)[:, None]  # a padding row has no tokens: 0, not NaN
    tl.store(out + row * stride + column, result.to(out.dtype.element_ty), mask=row < real)


@triton.jit
def finish(
    acc, l, m, out, stride, real, part_acc, part_l, part_m, arrived, first, part, count, head, heads,
    ROWS: tl.constexpr, ROOM: tl.constexpr, MERGED_ROOM: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the result of the only part. Of several, leave this one; the program that comes last merges and writes."""
    if count == 1:
        write(acc, l, out, stride, real, ROOM, DIM)
    else:
        before = leave_part(acc, l, m, part_acc, part_l, part_m, arrived, first, part, head, heads, ROWS, ROOM, DIM)
        if before == count - 1:
            merged, total = merge_parts(
                part_acc, part_l, part_m, arrived, first, count, head, heads, ROWS, MERGED_ROOM, DIM, AT_ONCE
            )
            write(merged, total, out, stride, real, MERGED_ROOM, DIM)


class Workspace:
    """Where parts are left, allocated once: a CUDA graph keeps its address.

    There are 2 * `target` places for each head, of `rows` rows each. The parts of cut sequences are fewer: to be cut at
    all a context must be 1.5 shares long, which rounds to at most 4/3 of what it is.
    """

    def __init__(self, target: int, heads: int, rows: int, dim: int, device: torch.device) -> None:
        self.target = target
        places = 2 * target * heads
        self.acc = torch.empty(places * rows, dim, dtype=torch.float32, device=device)
        self.l = torch.empty(places * rows, dtype=torch.float32, device=device)
        self.m = torch.empty(places * rows, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(places, dtype=torch.int32, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.acc, self.l, self.m, self.arrived


def num_sms(device: torch.device) -> int:
    """Of a GPU; two where the kernels are interpreted."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def padded_count(sequences: int) -> int:
    """1, 16, 64, 256, ...: few sizes, as each is a kernel to compile."""
    return 1 if sequences == 1 else next(16 << i for i in range(0, 32, 2) if 16 << i >= sequences)
