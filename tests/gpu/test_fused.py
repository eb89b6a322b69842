"""The fused kernels, compiled and on a GPU, at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stages
from common import SamplingParams
from common.execution.choose import choose_ops
from common.execution.gpu.fused import FusedOps
from common.models.layers import RMSNorm, RotaryEmbedding
from common.models.linear import Linear
from common.models.ops import Ops
from common.models.sources.random_weights import PRESETS
from tests.execution.cases import (
    Inputs,
    check_embed,
    check_norm,
    check_products,
    check_qk_norm_rope,
    check_sample,
    replays,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = torch.device("cuda")
HEADS = [((16, 8), 128), ((9, 3), 64), ((32, 8), 128)]
"""Qwen3-0.6B, SmolLM2-135M, Qwen3-4B."""


@pytest.fixture(params=[True, False], ids=["overlapping", "one after another"])
def ops(request: pytest.FixtureRequest) -> FusedOps:
    return FusedOps(DEVICE, pdl=request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 32, 33, 128, 129])
@pytest.mark.parametrize(("width", "outputs"), [(1024, 4096), (2048, 1024), (3072, 1024), (576, 960), (2560, 9728)])
def test_products_equal_their_definitions(
    ops: FusedOps, width: int, outputs: int, rows: int, dtype: torch.dtype
) -> None:
    if dtype == torch.float32 and rows > 33:
        return  # the library's, on both sides
    check_products(ops, Inputs(dtype, "cuda"), rows, width, outputs, bias=rows % 2 == 0)


def test_a_product_never_changes_from_run_to_run(ops: FusedOps) -> None:
    make = Inputs(torch.bfloat16, "cuda")
    for rows, width in ((1, 1024), (8, 2048), (16, 3072), (32, 1024), (64, 2048), (128, 1024)):
        x, norm, proj = make.tensor(rows, width), make.norm(width), make.linear(1024, width)
        first = ops.norm_linear(x, norm, proj)
        assert all(torch.equal(ops.norm_linear(x, norm, proj), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "dim"), [(576, 64), (1024, 128), (2560, 128)])
def test_every_row_is_that_of_its_own_token_and_position(
    ops: FusedOps, width: int, dim: int, dtype: torch.dtype
) -> None:
    for rows in (1, 7, 500):
        check_embed(ops, Inputs(dtype, "cuda"), rows, width, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [576, 1024, 2560])
def test_norm_equals_its_definition(ops: FusedOps, width: int, dtype: torch.dtype) -> None:
    check_norm(ops, Inputs(dtype, "cuda"), 300, width)


@pytest.mark.parametrize("shape", [(300, 1024), (7, 16, 128)])
def test_norm_on_a_gpu_is_its_definition(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        make = Inputs(dtype, "cuda")
        x, norm = make.tensor(*shape, scale=3), make.norm(shape[-1])
        got, expected = norm(x), norm.definition(x)
        off = (got != expected).float().mean().item()
        assert off < 0.01 or dtype == torch.float32  # a sum in another order, which rounding rarely shows
        torch.testing.assert_close(got, expected, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), HEADS)
@pytest.mark.parametrize("normalised", [False, True])
def test_every_head_is_normalised_and_rotated_on_its_own(
    ops: FusedOps, heads: tuple[int, int], dim: int, normalised: bool, dtype: torch.dtype
) -> None:
    for rows in (1, 7, 500):
        check_qk_norm_rope(ops, Inputs(dtype, "cuda"), rows, heads, dim, normalised)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_drawn_tokens_are_those_of_the_definition(ops: FusedOps, rows: int, dtype: torch.dtype) -> None:
    check_sample(ops, Inputs(dtype, "cuda"), rows, 151_936)


@pytest.mark.parametrize("rows", [2, 8, 16, 64, 128])
def test_a_kernel_that_starts_early_waits_for_its_input(rows: int) -> None:
    """A chain in a graph, each kernel reading what the one in front wrote, run many times with changing input. After 20
    layers roundings have added up: no more of them than in plain operations, both held against float32. Must not read
    too early."""
    make, width = Inputs(torch.bfloat16, "cuda"), 1024
    norm, up, down = make.norm(width), make.linear(6144, width), make.linear(width, 3072)
    x, residual = make.tensor(rows, width), make.tensor(rows, width)
    exact = RMSNorm(norm.weight.float(), norm.eps), Linear(up.weight.float()), Linear(down.weight.float())

    def chain(ops: Ops, layers: tuple[RMSNorm, Linear, Linear] = (norm, up, down)) -> torch.Tensor:
        its_norm, its_up, its_down = layers
        dtype = its_norm.weight.dtype
        y, given = residual.to(dtype, copy=True), x.to(dtype)
        for _ in range(20):
            y = ops.residual_linear(y, its_down, ops.norm_swiglu(y + given, its_norm, its_up))
        return y

    with torch.inference_mode():
        for number, result in enumerate(replays(chain, x, make, 50)):
            if number % 10 == 0:
                true = chain(Ops(), exact)
                fused, plain = result - true, chain(Ops()) - true
                assert fused.norm() < 1.1 * plain.norm()
                assert fused.abs().max() < 2 * plain.abs().max()


def test_embedding_is_looked_up_only_when_its_tokens_are_there() -> None:
    """Behind kernels that do not start early, in front of one that does."""
    make = Inputs(torch.bfloat16, "cuda")
    config = PRESETS["qwen3-0.6b"]
    embedding, norm = make.tensor(4096, config.hidden_size), make.norm(config.hidden_size)
    rotary, x = RotaryEmbedding(config, torch.bfloat16, DEVICE), make.tensor(3)

    def chain(ops: Ops) -> torch.Tensor:
        ids = (x.float() * 1000).long().abs() % 4096
        y, cos, sin = ops.embed(ids, ids, embedding, rotary)
        return torch.cat((ops.norm(y, norm), cos[:, 0], sin[:, 0]), dim=1)

    with torch.inference_mode():
        for _ in replays(chain, x, make, 50):
            pass


def test_greedy_tokens_equal_m0_in_float32() -> None:
    """Fused and plain, on a model of real width: the tokens that m0 finds by recomputing everything."""
    prompts = [[(7 * i * i + 3 * j) % 997 for i in range(n)] for j, n in enumerate((5, 17, 40))]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    found: list[list[list[int]]] = []
    stage: str
    options: dict[str, Any]
    for stage, options in (("m0", {}), ("m4", {}), ("m4", {"fused_kernels": False})):
        shared = {"model": "random:qwen3-0.6b", "device": "cuda", "max_model_len": 256, "kv_cache_memory": 1 << 30}
        with stages.build(stage, **shared, **options) as engine:
            found.append([output.outputs[0].token_ids for output in engine.generate(prompts, params)])
    assert found[0] == found[1] == found[2]


def test_fused_kernels_are_what_a_gpu_gets() -> None:
    assert isinstance(choose_ops(DEVICE, fused=True), FusedOps)
    assert type(choose_ops(DEVICE, fused=False)) is Ops
