"""Logits to tokens for any options and any size of the vocabulary, without a sort; definition: `execution.draws.draw`.

The vocabulary is cut into chunks. The first kernel reads the logits, once, and leaves for each chunk its maximum, the
first index that has it, and the sum of exp((logit - maximum) / temperature). The last, one program a row, finds the
chunk in which the cumulative probability passes the noise, and reads that chunk again. Between them come the kernels of
`triton_filter`, where a row may ask for top_k, top_p or min_p. A row's result depends on nothing but the row.
Cumulative sums are in float64, as in the definition: the two disagree only where the noise falls within float32's
rounding, some 1e-7, of a boundary between two tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.execution.draws import Draws, Kind
from common.execution.gpu import triton_filter
from common.execution.gpu.triton_elementwise import wait
from common.execution.gpu.triton_logits import CHUNK, MARK, MOST, exp_above, kept, read_logits, tie_weight

# pyright: basic


@triton.jit
def uniform(seed, position):
    """`common.sampler.uniform`, of int64 scalars."""
    z = seed.to(tl.uint64, bitcast=True) * tl.full([], 0xD1342543DE82EF95, tl.uint64)
    z += (position + 1).to(tl.uint64) * tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def chunk_kernel(
    logits, stride, settings, keys, marks, tops, firsts, weights, raw, vocab, chunks,
    CHUNK: tl.constexpr, DRAWN: tl.constexpr, MARKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    wait(PDL)
    values = read_logits(logits, stride, settings, keys, marks, vocab, row, token, MARKED)
    top = tl.max(values, 0)
    at = row * chunks + chunk
    tl.store(tops + at, top)
    tl.store(firsts + at, tl.min(tl.where(values == top, token, vocab), 0))
    if DRAWN:
        degree = tl.load(settings + row * 8)
        tl.store(weights + at, tl.sum(exp_above(values, top, tl.where(degree > 0, degree, 1.0)), 0))
    if MARKED:
        wanted = token < tl.where(tl.load(settings + row * 8 + 7) > 0, vocab, 0)
        tl.store(raw + row * vocab + token, tl.load(logits + row * stride + token, mask=wanted), mask=wanted)


@triton.jit
def pick_kernel(
    logits, stride, settings, keys, marks, tops, firsts, weights, ties, edges, tokens, vocab, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DRAWN: tl.constexpr, SHARED: tl.constexpr, MARKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    exists, at = chunk < chunks, row * chunks + chunk
    wait(PDL)
    slot = tl.load(keys + row * 4 + 3)
    top_of = tl.load(tops + at, mask=exists, other=-float("inf"))
    top = tl.max(top_of, 0)
    result = tl.min(tl.load(firsts + at, mask=exists & (top_of == top), other=vocab), 0)
    if DRAWN:
        degree = tl.load(settings + row * 8)
        safe = tl.where(degree > 0, degree, 1.0)
        weight = tl.load(weights + at, mask=exists, other=0.0)
        if SHARED:
            count = tl.load(ties + at, mask=exists, other=0)
            tied = tl.cumsum(count, 0) - count  # ties in the chunks in front
            each = tie_weight(edges, settings, row, top, safe, logits.dtype.element_ty)
            left = tl.where(each > 0, tl.load(edges + row * 4 + 1), 0.0)
            weight = weight.to(tl.float64) + tl.minimum(tl.maximum(left - tied, 0.0), count) * each
        else:
            weight = (weight * exp_above(top_of, top, safe)).to(tl.float64)
        behind = tl.cumsum(weight, 0)  # the weight of everything up to each chunk's end
        noise = uniform(tl.load(keys + row * 4), tl.load(keys + row * 4 + 1))
        target = noise * tl.max(behind, 0)
        passed = tl.sum((behind <= target).to(tl.int32), 0)
        last = tl.max(tl.where(weight > 0, chunk, 0), 0)
        here = tl.minimum(passed, last)
        before = tl.sum(tl.where(chunk == here, behind - weight, 0.0), 0)

        token = here * CHUNK + tl.arange(0, CHUNK)
        values = read_logits(logits, stride, settings, keys, marks, vocab, row, token, MARKED)
        inner = exp_above(values, top, safe)
        if SHARED:
            tied_here = tl.sum(tl.where(chunk == here, tied, 0), 0)
            above, tie = kept(values, inner, edges, settings, row, logits.dtype.element_ty)
            rank = tl.cumsum(tie.to(tl.int32), 0) - 1 + tied_here
            inner = tl.where(above | (tie & (rank.to(tl.float64) < left)), inner, 0.0)
        inner = inner.to(tl.float64)
        passed = tl.sum((before + tl.cumsum(inner, 0) <= target).to(tl.int32), 0)
        last = tl.max(tl.where(inner > 0, token, here * CHUNK), 0)
        result = tl.where(degree > 0, tl.minimum(here * CHUNK + passed, last), result)
    result = tl.minimum(result, vocab - 1).to(tl.int64)
    tl.store(tokens + slot, result)
    if MARKED:
        mark = tl.load(marks + slot * vocab + result)
        tl.store(marks + slot * vocab + result, tl.where((mark & MOST) < MOST, mark + MARK, mark))


def draw(logits: torch.Tensor, draws: Draws, kind: Kind, launch: dict[str, Any]) -> None:
    """logits [S, vocab], rows may lie apart."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    tops, weights = torch.empty(2, rows, chunks, dtype=torch.float32, device=logits.device)
    firsts = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    given = logits, logits.stride(0), draws.settings, draws.keys, draws.marks
    drawn, shared, marked = (bool(kind & bit) for bit in (Kind.DRAWN, Kind.SHARED, Kind.MARKED))
    first: Any = chunk_kernel[(rows, chunks)]
    first(
        *given, tops, firsts, weights, draws.raw, vocab, chunks, CHUNK=CHUNK, DRAWN=drawn, MARKED=marked, **launch
    )  # fmt: skip
    ties = edges = weights
    if shared:
        weights, ties, edges = triton_filter.filter_rows(*given, tops, weights, kind, launch)
    last: Any = pick_kernel[(rows,)]
    last(
        *given, tops, firsts, weights, ties, edges, draws.tokens, vocab, chunks,
        CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), DRAWN=drawn, SHARED=shared, MARKED=marked, **launch,
    )  # fmt: skip
