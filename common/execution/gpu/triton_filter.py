"""top_k, top_p and min_p without a sort: which logit is the last that a row keeps, its *edge*, and how many of the
tokens that have exactly this logit, the first ones, it keeps.

The edge is searched as a whole number (`triton_logits.ordered`), four bits at a time. One pass counts in each chunk the
tokens at or above each of 16 pivots, and adds up their probability; the next one goes on between the two pivots that
have the edge between them. First by rank (top_k), then by the share of what that leaves (top_p). Sums are added up in a
fixed order. Rows that do not ask leave at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.execution.draws import Kind
from common.execution.gpu.triton_elementwise import wait
from common.execution.gpu.triton_logits import CHUNK, exp_above, kept, ordered, read_logits, value_of

# pyright: basic

PIVOTS = tl.constexpr(16)
TILE = 256
"""Tokens that are compared with all pivots at a time."""


@triton.jit
def asks(settings, row, vocab, BY_RANK: tl.constexpr):
    """Does the row, and for what: top_k or top_p."""
    option = tl.load(settings + row * 8 + (1 if BY_RANK else 2))
    return (tl.load(settings + row * 8) > 0) & (option < (vocab if BY_RANK else 1.0)), option.to(tl.float64)


@triton.jit
def bracket(state, sums, edges, option, row, chunks, width, CHUNKS: tl.constexpr, BY_RANK: tl.constexpr):
    """What a pass has found, its pivots `width` apart: the last pivot at or above which there is enough, and count and
    weight of the tokens at or above the next one."""
    chunk, pivot = tl.arange(0, CHUNKS)[:, None], tl.arange(0, PIVOTS)[None, :]
    at = (row * chunks + chunk) * 2 * PIVOTS + pivot
    weight = tl.sum(tl.load(sums + at, mask=chunk < chunks, other=0.0), 0).to(tl.float64)
    count = weight
    if BY_RANK:
        count = tl.sum(tl.load(sums + at + PIVOTS, mask=chunk < chunks, other=0.0), 0).to(tl.float64)
    enough = count >= option if BY_RANK else weight >= tl.maximum(option * tl.load(edges + row * 4 + 2), 1e-30)
    index = tl.arange(0, PIVOTS)
    chosen = tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)
    count = tl.sum(tl.where(index == chosen + 1, count, 0.0), 0)
    weight = tl.sum(tl.where(index == chosen + 1, weight, 0.0), 0)
    if chosen == PIVOTS - 1:
        count, weight = tl.load(state + row * 4 + 1), tl.load(state + row * 4 + 2)
    return tl.load(state + row * 4).to(tl.int32) + chosen * width, count, weight


@triton.jit(do_not_specialize=["step", "width"])
def narrow_kernel(
    logits, stride, settings, keys, marks, tops, edges, old_state, old_sums, state, sums, vocab, chunks, step, width,
    LOWEST: tl.constexpr, BY_RANK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr,
    MARKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One pass over one chunk of a row: the sums at pivots that are `width` apart."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait(PDL)
    asked, option = asks(settings, row, vocab, BY_RANK)
    if asked:
        low = tl.full([], LOWEST, tl.int32)
        count, weight = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        if step > 0:
            low, count, weight = bracket(
                old_state, old_sums, edges, option, row, chunks, width * PIVOTS, CHUNKS, BY_RANK
            )
        if chunk == 0:
            tl.store(state + row * 4, low)
            tl.store(state + row * 4 + 1, count)
            tl.store(state + row * 4 + 2, weight)
        each = tl.arange(0, CHUNKS)
        top = tl.max(tl.load(tops + row * chunks + each, mask=each < chunks, other=-float("inf")), 0)
        temperature = tl.load(settings + row * 8)
        pivots = (low + tl.arange(0, PIVOTS) * width)[:, None]
        counts = tl.zeros([PIVOTS, TILE], tl.float32)  # a thread holds all pivots of its tokens, not the other way
        weights = tl.zeros([PIVOTS, TILE], tl.float32)
        for start in range(0, CHUNK, TILE):
            token = chunk * CHUNK + start + tl.arange(0, TILE)
            values = read_logits(logits, stride, settings, keys, marks, vocab, row, token, MARKED)
            reached = ordered(values, logits.dtype.element_ty)[None, :] >= pivots
            weights += tl.where(reached, exp_above(values, top, temperature)[None, :], 0.0)
            if BY_RANK:
                counts += reached.to(tl.float32)
        at = sums + (row * chunks + chunk) * 2 * PIVOTS + tl.arange(0, PIVOTS)
        tl.store(at, tl.sum(weights, 1))
        if BY_RANK:
            tl.store(at + PIVOTS, tl.sum(counts, 1))


@triton.jit
def settle_kernel(
    dtype_of, settings, tops, weights, state, sums, edges, vocab, chunks,
    CHUNKS: tl.constexpr, BY_RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row writes edges [3 of 4]: the edge, how many tokens at it are kept, and the weight of all kept."""
    row, each = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    wait(PDL)
    asked, option = asks(settings, row, vocab, BY_RANK)
    temperature = tl.load(settings + row * 8)
    top_of = tl.load(tops + row * chunks + each, mask=each < chunks, other=-float("inf"))
    top = tl.max(top_of, 0)
    if asked:
        edge, count, weight = bracket(state, sums, edges, option, row, chunks, 1, CHUNKS, BY_RANK)
        one = exp_above(value_of(edge, dtype_of.dtype.element_ty), top, temperature).to(tl.float64)
        if BY_RANK:
            left = option - count
        else:
            share = tl.maximum(option * tl.load(edges + row * 4 + 2), 1e-30)
            left = tl.ceil(((share - weight) / tl.maximum(one, 1e-300)).to(tl.float64))
        tl.store(edges + row * 4, edge)
        tl.store(edges + row * 4 + 1, left)
        tl.store(edges + row * 4 + 2, weight + left * one)
    elif BY_RANK:  # all are kept
        part = tl.load(weights + row * chunks + each, mask=each < chunks, other=0.0)
        part *= exp_above(top_of, top, tl.where(temperature > 0, temperature, 1.0))
        tl.store(edges + row * 4, -2147483648.0)
        tl.store(edges + row * 4 + 1, 0.0)
        tl.store(edges + row * 4 + 2, tl.sum(part.to(tl.float64), 0))


@triton.jit
def weigh_kernel(
    logits, stride, settings, keys, marks, tops, edges, weights, ties, vocab, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MARKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight of a chunk's tokens above the edge, and how many are at it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, each = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, CHUNKS)
    wait(PDL)
    temperature = tl.load(settings + row * 8)
    top = tl.max(tl.load(tops + row * chunks + each, mask=each < chunks, other=-float("inf")), 0)
    values = read_logits(logits, stride, settings, keys, marks, vocab, row, token, MARKED)
    weight = exp_above(values, top, tl.where(temperature > 0, temperature, 1.0))
    above, tie = kept(values, weight, edges, settings, row, logits.dtype.element_ty)
    tl.store(weights + row * chunks + chunk, tl.sum(tl.where(above, weight, 0.0), 0))
    tl.store(ties + row * chunks + chunk, tl.sum(tie.to(tl.int32), 0))


def filter_rows(
    logits: torch.Tensor, stride: int, settings: torch.Tensor, keys: torch.Tensor, marks: torch.Tensor,
    tops: torch.Tensor, weights: torch.Tensor, kind: Kind, launch: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """tops, weights [S, chunks]: of each chunk; kind: what rows may ask for. Returns the weight of what is kept of
    each chunk, relative to the row's maximum and without the tokens at the edge; how many are at the edge; and edges
    [S, 4]."""
    ranked, marked = bool(kind & Kind.RANKED), bool(kind & Kind.MARKED)
    (rows, chunks), vocab, bits = tops.shape, logits.shape[1], 8 * logits.element_size()
    given, sizes = (logits, stride, settings, keys, marks), {"CHUNKS": triton.next_power_of_2(chunks), **launch}
    state = torch.empty(2, rows, 4, dtype=torch.float64, device=logits.device)
    sums = torch.empty(2, rows, chunks, 2, PIVOTS.value, dtype=torch.float32, device=logits.device)
    edges = torch.empty(rows, 4, dtype=torch.float64, device=logits.device)
    narrow: Any = narrow_kernel[(rows, chunks)]
    settle: Any = settle_kernel[(rows,)]
    for by_rank in (True, False):
        for step, shift in enumerate(range(bits - 4, -1, -4)) if ranked or not by_rank else ():
            old, new = 1 - step % 2, step % 2
            narrow(
                *given, tops, edges, state[old], sums[old], state[new], sums[new], vocab, chunks, step, 1 << shift,
                LOWEST=-(1 << (bits - 1)), BY_RANK=by_rank, CHUNK=CHUNK, TILE=TILE, MARKED=marked, **sizes,
            )  # fmt: skip
        settle(logits, settings, tops, weights, state[1], sums[1], edges, vocab, chunks, BY_RANK=by_rank, **sizes)
    ties = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    kept_weights = torch.empty_like(weights)
    weigh: Any = weigh_kernel[(rows, chunks)]
    weigh(*given, tops, edges, kept_weights, ties, vocab, chunks, CHUNK=CHUNK, MARKED=marked, **sizes)
    return kept_weights, ties, edges
