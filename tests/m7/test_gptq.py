"""The algorithm against what it promises: less output error than rounding, and the paper's slow form."""

from __future__ import annotations

import pytest
import torch

from common import UserError
from stages.m7_gptq import gptq as module
from stages.m7_gptq.checkpoint.baselines import round_to_nearest
from stages.m7_gptq.gptq import Hessian, gptq, inverse_factor
from stages.m7_gptq.grid import fit_grid
from stages.m7_gptq.settings import Settings


def problem(inputs: int = 192, outputs: int = 32, rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] and correlated inputs [rows, in]."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.diag(
        torch.rand(inputs, generator=generator)
    )
    x = torch.randn(rows, inputs, generator=generator) @ mixing
    return torch.randn(outputs, inputs, generator=generator), x


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1], x.device)
    for chunk in x.split(300):
        hessian.add(chunk)
    return hessian.matrix


def output_error(weight: torch.Tensor, quantised: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - quantised) @ x.T).square().mean())


def test_the_hessian_does_not_depend_on_the_chunks() -> None:
    _, x = problem()
    assert torch.allclose(hessian_of(x), 2 * x.T @ x / len(x), atol=1e-4)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_better_than_rounding_on_the_same_grid(group: int, symmetric: bool, desc_act: bool) -> None:
    weight, x = problem()
    settings = Settings(group_size=group, symmetric=symmetric, desc_act=desc_act)
    quantised, loss = gptq(weight, hessian_of(x), settings)
    error = output_error(weight, quantised.dequantize(), x)
    assert error < 0.7 * output_error(weight, round_to_nearest(weight, settings).dequantize(), x)
    assert loss == pytest.approx(error, rel=0.15), "the loss is the output error, up to the damping"


def slow_gptq(weight: torch.Tensor, hessian: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Column by column with an inverse that is updated at every step (Optimal Brain Quantization, the paper's equations
    2 and 3), in float64: no Cholesky factor, no blocks."""
    columns = weight.double().T.clone()
    damped = hessian.double()
    inverse = torch.linalg.inv(damped + settings.damping * damped.diagonal().mean() * torch.eye(len(damped)))
    result = torch.empty_like(columns)
    group = settings.group_of(len(columns))
    for i in range(len(columns)):
        if i % group == 0:
            importance = hessian.diagonal()[i : i + group]
            grid = fit_grid(columns[i : i + group].float(), settings, importance)
        result[i] = grid.values(grid.codes(columns[i].float())).double()
        error = (columns[i] - result[i]) / inverse[i, i]
        columns -= torch.outer(inverse[:, i], error)
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result.T.float()


@pytest.mark.parametrize("group", [32, 64, -1])
def test_equal_to_the_slow_form(group: int) -> None:
    """Groups smaller than the block get their grid from weights that the group before has changed: a grid from stale
    weights fails here."""
    weight, x = problem()
    settings = Settings(group_size=group, symmetric=False)
    fast, _ = gptq(weight, hessian_of(x), settings)
    slow = slow_gptq(weight, hessian_of(x), settings)
    same = torch.isclose(fast.dequantize(), slow, atol=1e-3).float().mean()
    assert float(same) > 0.97, "a few near-ties may round differently, and pass their difference on"


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem()
    settings = Settings(group_size=32, symmetric=True)
    whole, _ = gptq(weight, hessian_of(x), settings)
    monkeypatch.setattr(module, "BLOCK", 32)
    small, _ = gptq(weight, hessian_of(x), settings)
    assert float((whole.codes() == small.codes()).float().mean()) > 0.99


def test_act_order_takes_the_largest_activations_first() -> None:
    weight, x = problem()
    x[:, 150] *= 50
    quantised, _ = gptq(weight, hessian_of(x), Settings(group_size=32, symmetric=True, desc_act=True))
    assert quantised.g_idx is not None and int(quantised.g_idx[150]) == 0
    assert quantised.g_idx.bincount().tolist() == [32] * 6


@pytest.mark.parametrize("desc_act", [False, True])
def test_inputs_that_are_always_zero_do_not_widen_the_grid(desc_act: bool) -> None:
    settings = Settings(group_size=32, symmetric=True, desc_act=desc_act)
    weight, x = problem()
    x[:, 10:20] = 0
    weight[:, 10:20] = 0
    usual, _ = gptq(weight, hessian_of(x), settings)
    weight[:, 10:20] = 1000  # must not widen the grid of its group
    quantised, loss = gptq(weight, hessian_of(x), settings)
    assert torch.equal(quantised.dequantize(), usual.dequantize())
    assert loss == pytest.approx(output_error(weight, quantised.dequantize(), x), rel=0.15)


def test_a_layer_whose_inputs_are_all_zero_becomes_zero() -> None:
    weight, x = problem()
    quantised, loss = gptq(weight, hessian_of(x * 0), Settings())
    assert loss == 0 and not bool(quantised.dequantize().any())


def test_the_factor_is_one_of_the_inverse() -> None:
    _, x = problem()
    hessian = hessian_of(x)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(len(hessian)), atol=1e-2)
    assert torch.equal(factor, factor.triu())


def test_activations_that_are_not_finite_are_refused() -> None:
    weight, x = problem()
    x[5, 5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        gptq(weight, hessian_of(x), Settings())


def test_a_hessian_without_an_inverse_is_refused() -> None:
    weight, _ = problem()
    with pytest.raises(UserError, match="not positive definite"):
        gptq(weight, -torch.eye(weight.shape[1]), Settings())
