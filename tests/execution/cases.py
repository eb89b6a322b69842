"""Inputs for the eight operations, and how near the fused ones must come to their definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from common.execution.choose import choose_draw
from common.execution.draws import KEYS, POSITION, SETTINGS, Draws, Kind
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear
from common.models.ops import Ops
from common.models.sources.random_weights import PRESETS
from common.sampler import uniform

TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 2e-2},
}
"""The order of the sums, and the rounding of the result."""


@dataclass
class Inputs:
    """Tensors of about unit size, from one seed, so that a fused operation and its definition get the same."""

    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def tensor(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def norm(self, width: int, eps: float = 1e-5) -> RMSNorm:
        return RMSNorm(1 + self.tensor(width, scale=0.3), eps)

    def linear(self, outputs: int, width: int, bias: bool = False) -> Linear:
        return Linear(self.tensor(outputs, width, scale=width**-0.5), self.tensor(outputs) if bias else None)

    def angles(self, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, 1, D], as `RotaryEmbedding.at` gives them: two views of one tensor."""
        angles = torch.randn(tokens, dim // 2, generator=self.generator) * 3
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)[:, :, None]
        cos, sin = table.to(self.device, self.dtype).unbind(1)
        return cos, sin


def close(fused: torch.Tensor, plain: torch.Tensor) -> None:
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, **TOLERANCE[plain.dtype])


def check_embed(ops: Ops, make: Inputs, rows: int, width: int, dim: int) -> None:
    """Copies: the same bits. A token and a position may come twice."""
    embedding = make.tensor(40, width)
    config = replace(PRESETS["tiny-llama"], head_dim=dim, max_position_embeddings=50)
    rotary = RotaryEmbedding(config, make.dtype, torch.device(make.device))
    ids, positions = (torch.randint(n, (rows,), generator=make.generator).to(make.device) for n in (40, 50))
    expected = Ops().embed(ids, positions, embedding, rotary)
    for fused, plain in zip(ops.embed(ids, positions, embedding, rotary), expected, strict=True):
        assert torch.equal(fused, plain) and fused.stride() == plain.stride()


def check_norm(ops: Ops, make: Inputs, rows: int, width: int) -> None:
    x, norm = make.tensor(rows, width, scale=3), make.norm(width)
    close(ops.norm(x, norm), Ops().norm(x, norm))


def check_products(ops: Ops, make: Inputs, rows: int, width: int, outputs: int, bias: bool = False) -> None:
    """All three products with what is fused to them."""
    x, norm = make.tensor(rows, width, scale=3), make.norm(width)
    proj, gate_up = make.linear(outputs, width, bias), make.linear(2 * outputs, width)
    close(ops.norm_linear(x, norm, proj), Ops().norm_linear(x, norm, proj))
    close(ops.norm_swiglu(x, norm, gate_up), Ops().norm_swiglu(x, norm, gate_up))
    residual = make.tensor(rows, outputs)
    expected = Ops().residual_linear(residual, proj, x)
    close(ops.residual_linear(residual.clone(), proj, x), expected)


def check_qk_norm_rope(ops: Ops, make: Inputs, rows: int, heads: tuple[int, int], dim: int, normalised: bool) -> None:
    """Queries and keys are views of one fused projection; the values behind them stay as they are."""
    num_q, num_kv = heads
    qkv = make.tensor(rows, num_q + 2 * num_kv, dim)
    norms = (make.norm(dim), make.norm(dim)) if normalised else (None, None)
    cos, sin = make.angles(rows, dim)
    expected = Ops().qk_norm_rope(qkv[:, : num_q + num_kv].clone(), num_q, *norms, cos, sin)
    values = qkv[:, num_q + num_kv :].clone()
    close(ops.qk_norm_rope(qkv[:, : num_q + num_kv], num_q, *norms, cos, sin), expected)
    assert torch.equal(qkv[:, num_q + num_kv :], values)


def drawn(ops: Ops, logits: torch.Tensor, degrees: float | torch.Tensor = 0.0, seed: int = 0) -> torch.Tensor:
    """One token a row, at these temperatures; the noise of row r is that of (seed, r). Can be captured in a graph."""
    (rows, vocab), place = logits.shape, partial(torch.zeros, device=logits.device)
    settings, keys = place(rows, SETTINGS), place(rows, KEYS, dtype=torch.long)
    settings[:, 0], keys[:, 0] = degrees, seed
    keys[:, POSITION] = keys[:, 3] = torch.arange(rows, device=logits.device)
    kept = place(rows, vocab, dtype=torch.int16), place(rows, dtype=torch.long), *[logits[:0]] * 3
    draws = Draws(settings, keys, *kept)
    choose_draw(ops)(logits, draws, Kind.LIKELIEST if isinstance(degrees, float) and not degrees else Kind.DRAWN)
    return draws.tokens


def check_sample(ops: Ops, make: Inputs, rows: int, vocab: int, temperature: float = 1.0, draws: int = 8) -> None:
    """The same tokens as the definition, except where the noise is within float32's rounding of a boundary."""
    logits = make.tensor(rows, vocab, scale=2)
    assert torch.equal(drawn(ops, logits), Ops().sample(logits))
    degrees = torch.full((rows,), temperature, device=make.device)
    degrees[::3] = 0.0
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    for seed in range(draws):
        noise = torch.tensor([uniform(seed, row) for row in range(rows)], device=make.device)
        fused, plain = drawn(ops, logits, degrees, seed), Ops().sample(logits, degrees, noise)
        assert torch.equal(fused[::3], logits[::3].argmax(-1))
        for row in (fused != plain).nonzero()[:, 0].tolist():
            low, high = sorted((int(fused[row]), int(plain[row])))
            between = cumulative[row, low:high]
            assert (between - noise[row]).abs().max() < 1e-6, f"{low} and {high} for {noise[row]}"


def replays(chain: Callable[[Ops], torch.Tensor], x: torch.Tensor, make: Inputs, count: int) -> Iterator[torch.Tensor]:
    """A chain of kernels that start early, captured once and replayed with changing x: each result, after it was found
    to be that of kernels which start one after another."""
    from common.execution.gpu.fused import FusedOps  # needs triton, which not every machine has

    early, in_order = (FusedOps(x.device, overlap) for overlap in (True, False))
    chain(early)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(early)
    for seed in range(count):
        x.copy_(replace(make, seed=seed).tensor(*x.shape))
        graph.replay()
        assert torch.equal(result, chain(in_order)), f"replay {seed} differs"
        yield result
