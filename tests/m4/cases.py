"""Ragged steps over a scattered cache, and the full formula in float64 to hold the backends against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from common.batch import RaggedBatch
from common.models.decoder import DecoderLayer
from common.models.layers import RMSNorm
from common.models.linear import Linear
from common.models.ops import Ops
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend, naive
from tests.execution.cases import Inputs

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of the largest number in the same row of the answer: over a long context the answers are small, as are lost keys.
A number in bfloat16 is rounded by up to 0.4 % (float16: 0.05 %), in the weights and in the result."""


@dataclass
class Case:
    """A step whose older tokens are in the cache already. `expected` [T, Hq, D] is float64's answer."""

    shape: AttentionShape
    batch: RaggedBatch
    kv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    expected: torch.Tensor

    def run(self, backend: Backend) -> torch.Tensor:
        backend.begin(self.batch)
        backend.store(self.kv, self.k, self.v)
        return backend.attend(self.q, self.kv)

    def check(self, backend: Backend) -> None:
        result = self.run(backend)
        assert result.shape == self.q.shape
        assert result.dtype == self.q.dtype
        error = relative_error(result, self.expected)
        assert error < TOLERANCE[self.q.dtype], f"off by {error}"


def check_fused_qkv(case: Case, backend: Backend, normalised: bool = True) -> None:
    """A decode from heads as the projection gives them: as exact as operation after operation, in the model's dtype,
    and with the same numbers in the cache, but for the last bit."""
    make = Inputs(case.q.dtype, str(case.q.device))
    (_, num_q, dim), num_kv = case.q.shape, case.k.shape[1]
    qkv = torch.cat((case.q, case.k, case.v), dim=1)
    norms = (make.norm(dim), make.norm(dim)) if normalised else (None, None)
    cos, sin = make.angles(len(qkv), dim)
    qk = Ops().qk_norm_rope(qkv[:, : num_q + num_kv].clone(), num_q, *norms, cos, sin)
    step = replace(case, q=qk[:, :num_q], k=qk[:, num_q:], kv=case.kv.clone())
    expected = step.run(naive.create(case.shape))
    layer = make_layer(num_q, num_kv, dim, *norms)
    backend.begin(case.batch)
    if backend.fuses_qkv():  # a step before, at other positions: nothing of it may be left over
        backend.fused_qkv(layer, qkv.clone(), *make.angles(len(qkv), dim), case.kv.clone())
    backend.begin(case.batch)
    assert backend.fuses_qkv()
    result = backend.fused_qkv(layer, qkv, cos, sin, case.kv)
    error = relative_error(result, expected.double())
    assert error < 2 * TOLERANCE[qkv.dtype], f"off by {error}"
    eps = 4 * torch.finfo(qkv.dtype).eps
    torch.testing.assert_close(case.kv, step.kv, equal_nan=True, atol=eps, rtol=eps)


def make_layer(num_q: int, num_kv: int, dim: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> DecoderLayer:
    """With nothing in it but its heads and their norms."""
    norm, linear = RMSNorm(torch.ones(1), 1e-5), Linear(torch.ones(1, 1))
    return DecoderLayer(0, num_q, num_kv, dim, norm, linear, linear, norm, linear, linear, q_norm, k_norm)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of [T, Hq, D] as a share of the largest number in its row of D; a row of zeros counts as 1."""
    scale = expected.abs().amax(-1)
    error = (result.double() - expected).abs().amax(-1) / torch.where(scale > 0, scale, 1.0)
    return error.max().item()  # NaN is no error that is small


def full_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [N, Hq, D], the last N of S positions; k, v [S, Hkv, D]; softmax(q k^T / sqrt(D)) v in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    n, s = scores.shape[1:]
    future = torch.ones(n, s, dtype=torch.bool, device=q.device).triu(s - n + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def make_case(
    chunks: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    padded_rows: int = 0,
    poison: float = torch.nan,
    seed: int = 0,
) -> Case:
    """chunks: (query tokens, context after the step) of each sequence, decodes first; after the decodes come
    `padded_rows` dummies of one token and no context, as a CUDA graph has them, whose results are never read.

    Blocks are dealt in random order; every slot that no token owns holds `poison`, so that reading one shows. Block 0
    is no sequence's: the dummies write there, and unused entries of the block tables point at it.
    """
    generator = torch.Generator().manual_seed(seed)
    decodes = sum(1 for n, _ in chunks if n == 1)
    assert all(n == 1 for n, _ in chunks[:decodes]), "decodes come first"
    chunks = [*chunks[:decodes], *[(1, 0)] * padded_rows, *chunks[decodes:]]
    num_heads, num_kv_heads = heads
    needed = [-(-s // block_size) for _, s in chunks]
    num_blocks = 1 + sum(needed)
    order = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()
    tables = torch.zeros(len(chunks), max(needed) + 1, dtype=torch.int32)
    kv = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), poison, dtype=dtype)
    q_parts, k_parts, v_parts, slots, positions, expected = [], [], [], [], [], []
    for row, (n, s) in enumerate(chunks):
        blocks = [order.pop() for _ in range(needed[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        q = torch.randn(n, num_heads, head_dim, generator=generator).to(dtype)
        k, v = (torch.randn(max(s, 1), num_kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        where = [blocks[p // block_size] * block_size + p % block_size for p in range(s)] or [0]
        old = max(s, 1) - n
        for half, x in zip(kv, (k, v), strict=True):
            half.flatten(0, 1)[where[:old]] = x[:old]
        q_parts.append(q), k_parts.append(k[old:]), v_parts.append(v[old:])
        slots += where[old:]
        positions += range(old, old + n)
        expected.append(full_formula(q, k, v) if s else torch.zeros(n, num_heads, head_dim, dtype=torch.float64))
    lengths = torch.tensor([n for n, _ in chunks])
    batch = RaggedBatch(
        input_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
        positions=torch.tensor(positions, device=device),
        query_start_loc=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        seq_lens=torch.tensor([s for _, s in chunks], dtype=torch.int32, device=device),
        logit_indices=(lengths.cumsum(0) - 1).to(device),
        max_query_len=int(lengths.max()),
        max_seq_len=max(1, *(s for _, s in chunks)),
        num_decodes=decodes + padded_rows,
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=tables.to(device),
    )
    # As the model makes them: q, k and v are views of one fused projection, so their rows lie apart.
    fused = torch.cat([torch.cat(p).flatten(1) for p in (q_parts, k_parts, v_parts)], dim=1).to(device)
    q, k, v = fused.split([h * head_dim for h in (num_heads, num_kv_heads, num_kv_heads)], dim=1)
    q, k, v = (x.unflatten(1, (-1, head_dim)) for x in (q, k, v))
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, block_size, dtype, torch.device(device))
    return Case(shape, batch, kv.to(device), q, k, v, torch.cat(expected).to(device))


B = 16
STEPS = {
    "one token of context": [(1, 1)],
    "decode around a block's end": [(1, n) for n in (1, B - 1, B, B + 1, 2 * B, 2 * B + 1)],
    "decode, many blocks": [(1, 5 * B + 3), (1, 20 * B), (1, 7)],
    "one long decode": [(1, 40 * B + 1)],
    "whole prompts around a block's end": [(n, n) for n in (B - 1, B, B + 1, 2, 3 * B)],
    "a prompt of many tiles": [(300, 300)],
    "chunks at any offset": [(5, 6), (17, 40), (16, 16), (33, 150), (2, 129)],
    "a long chunk, far in": [(130, 420)],
    "tiles that are full, and one more": [(64, 64), (65, 70), (128, 128), (2, 9), (33, 33), (127, 200)],
    "decodes and chunks in one step": [(1, 100), (1, 1), (1, 17), (70, 70), (20, 93), (3, 200)],
}
"""TRAPS.md: attention that is right at one length and wrong at another."""

SHORT_STEPS = STEPS | {
    "decode, many blocks": [(1, 5 * B + 3), (1, 10 * B), (1, 7)],
    "one long decode": [(1, 18 * B + 1)],
    "a prompt of many tiles": [(135, 135)],
    "a long chunk, far in": [(66, 170)],
    "tiles that are full, and one more": [(64, 64), (65, 70), (2, 9), (33, 33), (63, 127)],
    "decodes and chunks in one step": [(1, 100), (1, 1), (1, 17), (42, 42), (20, 63), (3, 100)],
}
"""The same edges of a float32 kernel's tiles, 64 queries by 32 keys, with fewer tokens: for Triton's interpreter."""

LENGTHS = (1, 2, B, B + 1, 63, 64, 65, 129, 300, 1000)
"""Contexts of one decode: around a block's and a tile's end, and of several parts."""

HEADS = [(2, 2), (4, 2), (3, 1), (4, 1), (8, 1), (9, 3)]
"""Groups of 1, 2, 3, 4, 8, and 3 with several KV heads."""
