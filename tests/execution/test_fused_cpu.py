"""The kernels compiled for a CPU, against their definitions."""

from __future__ import annotations

import pytest
import torch

from common.execution.cpu import fused_cpu
from common.execution.cpu.fused_cpu import CompiledOps
from common.models import load_model
from common.models.layers import RMSNorm
from common.models.ops import Ops
from tests.execution.cases import Inputs, check_norm, check_products, close
from tests.helpers import all_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[0, 1, 3], ids=["one thread", "one of several", "three threads"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompiledOps:
    """Rows shared out among threads: by one thread here, each part after the other."""
    if request.param:
        monkeypatch.setattr(fused_cpu, "SINGLE_THREAD_LIMIT", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return CompiledOps()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 48, 100, 576, 1024])
def test_rows_are_never_mixed_up_nor_cut(ops: CompiledOps, width: int, dtype: torch.dtype) -> None:
    """100 is no multiple of a vector: there the definition steps in."""
    for rows in (1, 2, 3, 33):
        check_norm(ops, Inputs(dtype), rows, width)
        check_products(ops, Inputs(dtype), rows, width, width, bias=rows == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_only_where_the_definition_rounds_them(ops: CompiledOps, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, norm, gate_up = make.tensor(40, 576, scale=3), make.norm(576), make.tensor(40, 3072, scale=4)
    for fused, plain in ((ops.norm(x, norm), norm(x)), (ops.swiglu(gate_up), Ops().swiglu(gate_up))):
        off = (fused != plain).float().mean().item()
        assert off < 0.01 or dtype == torch.float32  # a sum in another order, which rounding rarely shows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_large_numbers_never_overflows(ops: CompiledOps, dtype: torch.dtype) -> None:
    gate = torch.tensor([-6e4, -300, -90, -1e-3, -0.0, 0.0, 1e-3, 20, 90, 300, 6e4] + [1.0] * 5)
    gate_up = torch.cat((gate, torch.ones(16)))[None].to(dtype)
    close(ops.swiglu(gate_up), Ops().swiglu(gate_up))


def test_rows_that_lie_apart_give_the_right_results(ops: CompiledOps) -> None:
    make = Inputs(torch.float32)
    wide, norm = make.tensor(5, 128), make.norm(64)
    close(ops.norm(wide[:, 32:96], norm), norm(wide[:, 32:96]))
    close(ops.swiglu(wide[:, 32:96]), Ops().swiglu(wide[:, 32:96]))


def test_a_weight_of_another_dtype_or_with_gaps_is_read_as_it_is(ops: CompiledOps) -> None:
    make = Inputs(torch.float32)
    x, wide, apart = make.tensor(2, 64).bfloat16(), make.norm(64), RMSNorm(make.tensor(128)[::2].bfloat16(), 1e-5)
    assert torch.equal(ops.norm(x, wide), wide(x)) and ops.norm(x, wide).dtype == torch.float32
    assert torch.equal(ops.norm(x, apart), apart(x))


def test_another_norm_at_the_same_address_has_its_own_weights(ops: CompiledOps) -> None:
    """Weights are kept by their address, so a freed one's must not come back with other numbers."""
    make = Inputs(torch.float32)
    x = make.tensor(2, 64)
    for _ in range(20):
        norm = make.norm(64)
        close(ops.norm(x, norm), norm(x))
        del norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [16, 48, 100, 1024])
def test_of_equally_likely_tokens_the_first_is_taken(ops: CompiledOps, vocab: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 3, 17):
        logits = Inputs(dtype).tensor(rows, vocab)
        logits[-1, [vocab // 3, vocab - 1]] = 99
        logits[0, ::2] = -torch.inf
        assert torch.equal(ops.sample(logits), Ops().sample(logits))
        for same in (-torch.inf, 0.0, torch.inf):
            assert not ops.sample(torch.full_like(logits, same)).any()
        logits[:, vocab // 2] = torch.nan  # such a model is broken; the token must be one of its own all the same
        assert ((ops.sample(logits) >= 0) & (ops.sample(logits) < vocab)).all()


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_whole_model_gives_the_same_logits(ops: CompiledOps, preset: str, tokens: int) -> None:
    model = load_model(f"random:{preset}")
    ids = [(7 * i * i + 3) % 97 for i in range(tokens)]
    expected = all_logits(model, ids)
    model.ops = ops
    torch.testing.assert_close(all_logits(model, ids), expected, atol=2e-4, rtol=1e-4)
