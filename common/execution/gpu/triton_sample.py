"""Logits to tokens in two launches, whatever the size of the vocabulary; definition: `Ops.sample`.

The vocabulary is cut into chunks. The first kernel reads the logits, once, and leaves for each chunk its maximum, the
first index that has it, and the sum of exp((logit - maximum) / temperature). The second, one program a row, finds the
chunk in which the cumulative probability passes the noise, and reads that chunk again. A row's result depends on
nothing but the row. Cumulative sums are in float64, as in the definition: the two disagree only where the noise falls
within float32's rounding, some 1e-7, of a boundary between two tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# pyright: basic

CHUNK = 2048


@triton.jit
def exp_above(logits, top, temperature):
    """exp((logits - top) / temperature); 0 where a logit is -inf, even if all are."""
    return tl.exp((logits - tl.maximum(top, -1e38)) / temperature)


@triton.jit
def chunk_kernel(
    logits, temperature, tops, firsts, weights, vocab, chunks, stride, CHUNK: tl.constexpr, DRAW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    top = tl.max(values, 0)
    at = row * chunks + chunk
    tl.store(tops + at, top)
    tl.store(firsts + at, tl.min(tl.where(values == top, token, vocab), 0))
    if DRAW:
        degree = tl.load(temperature + row)
        tl.store(weights + at, tl.sum(exp_above(values, top, tl.where(degree > 0, degree, 1.0)), 0))


@triton.jit
def pick_kernel(
    logits, temperature, noise, tops, firsts, weights, out, vocab, chunks, stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DRAW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    exists, at = chunk < chunks, row * chunks + chunk
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    top_of = tl.load(tops + at, mask=exists, other=-float("inf"))
    top = tl.max(top_of, 0)
    first = tl.load(firsts + at, mask=exists & (top_of == top), other=vocab)
    result = tl.min(first, 0)
    if DRAW:
        degree = tl.load(temperature + row)
        safe = tl.where(degree > 0, degree, 1.0)
        weight = tl.load(weights + at, mask=exists, other=0.0)
        weight = (weight * exp_above(top_of, top, safe)).to(tl.float64)
        behind = tl.cumsum(weight, 0)  # the weight of everything up to each chunk's end
        target = tl.load(noise + row) * tl.max(behind, 0)
        passed = tl.sum((behind <= target).to(tl.int32), 0)
        last = tl.max(tl.where(weight > 0, chunk, 0), 0)
        here = tl.minimum(passed, last)
        before = tl.sum(tl.where(chunk == here, behind - weight, 0.0), 0)

        token = here * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        inner = exp_above(values, top, safe).to(tl.float64)
        passed = tl.sum((before + tl.cumsum(inner, 0) <= target).to(tl.int32), 0)
        last = tl.max(tl.where(inner > 0, token, here * CHUNK), 0)
        result = tl.where(degree > 0, tl.minimum(here * CHUNK + passed, last), result)
    tl.store(out + row, tl.minimum(result, vocab - 1).to(tl.int64))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, noise: torch.Tensor | None, launch: dict[str, Any]
) -> torch.Tensor:
    """logits [S, vocab], rows may lie apart; temperature [S] float32 and noise [S] float64, or None for both."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    tops, weights = torch.empty(2, rows, chunks, dtype=torch.float32, device=logits.device)
    firsts = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    draw = temperature is not None
    first: Any = chunk_kernel[(rows, chunks)]
    first(logits, temperature, tops, firsts, weights, vocab, chunks, logits.stride(0), CHUNK=CHUNK, DRAW=draw, **launch)
    second: Any = pick_kernel[(rows,)]
    second(
        logits, temperature, noise, tops, firsts, weights, out, vocab, chunks, logits.stride(0), CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks), DRAW=draw, **launch,
    )  # fmt: skip
    return out
