"""GPTQ, one column at a time, on a problem of a few numbers."""

from __future__ import annotations

import pytest
import torch

from stages.m7_gptq.checkpoint.baselines import round_to_nearest
from stages.m7_gptq.gptq import Hessian, gptq
from stages.m7_gptq.settings import Settings
from tests.m7.test_gptq import output_error, slow_gptq
from tests.steps import close, same

SETTINGS = Settings(group_size=-1, symmetric=True, search=False)


def problem(inputs: int = 8, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs], inputs [500, inputs] of which each resembles its neighbours, their Hessian."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, inputs + 3, generator=generator).unfold(1, 4, 1).sum(-1)
    hessian = 2 * x.T @ x / len(x)
    return torch.randn(outputs, inputs, generator=generator), x, hessian


def gathered(*parts: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(parts[0].shape[1], torch.device("cpu"))
    for part in parts:
        hessian.add(part)
    return hessian.matrix.flatten()


def test_the_hessian_is_twice_the_mean_of_products() -> None:
    close("`Hessian` of one row (1, 2): 2 x x^T", gathered(torch.tensor([[1.0, 2.0]])), [2.0, 4.0, 4.0, 8.0])


def test_the_hessian_is_a_mean_over_all_rows() -> None:
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    close("`Hessian` of the rows 1, then 3 and 5 (squares 1, 9, 25)", gathered(one, two), [70 / 3, 0.0, 0.0, 0.0])


def test_the_first_column_is_only_rounded() -> None:
    weight, _, hessian = problem()
    got, rounded = gptq(weight, hessian, SETTINGS)[0].dequantize(), round_to_nearest(weight, SETTINGS).dequantize()
    close("the first input's weights: nothing has been passed on to them", got[:, 0], rounded[:, 0].tolist())


def test_later_columns_make_good_the_errors_of_earlier_ones() -> None:
    weight, _, hessian = problem()
    got, rounded = gptq(weight, hessian, SETTINGS)[0].dequantize(), round_to_nearest(weight, SETTINGS).dequantize()
    same("Is the result the same as plain rounding?", torch.equal(got, rounded), False)


def test_errors_are_made_good_and_not_doubled() -> None:
    weight, x, hessian = problem()
    ours, plain = gptq(weight, hessian, SETTINGS)[0], round_to_nearest(weight, SETTINGS)
    error, rounding = (output_error(weight, quantised.dequantize(), x) for quantised in (ours, plain))
    same(f"Is the error of the outputs ({error:.4f}) less than that of plain rounding ({rounding:.4f})?",
         error < rounding, True)  # fmt: skip


def test_what_is_passed_on_is_the_least_squares_solution() -> None:
    weight, _, hessian = problem()
    got = gptq(weight, hessian, SETTINGS)[0].dequantize()
    close("the quantised weights, against the paper's slow form", got, slow_gptq(weight, hessian, SETTINGS))


def test_later_blocks_get_the_errors_of_earlier_ones() -> None:
    """200 inputs are a block of 128 and one of 72."""
    weight, _, hessian = problem(200, outputs=32)
    ours, plain = gptq(weight, hessian, SETTINGS)[0].dequantize(), round_to_nearest(weight, SETTINGS).dequantize()
    untouched = torch.equal(ours[:, 128], plain[:, 128])
    same("Are the weights of input 128, the first of the second block, only rounded?", untouched, False)


def test_the_loss_is_the_error_of_the_outputs() -> None:
    weight, x, hessian = problem(200)
    quantised, loss = gptq(weight, hessian, SETTINGS)
    error = output_error(weight, quantised.dequantize(), x)
    same(f"Is the loss ({loss:.3f}) the mean squared error of the outputs ({error:.3f}), up to the damping?",
         loss == pytest.approx(error, rel=0.3), True)  # fmt: skip
