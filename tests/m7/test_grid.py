"""Grids: what they reach, and what the search wins."""

from __future__ import annotations

import pytest
import torch

from common import UserError
from stages.m7_gptq.checkpoint.baselines import check_shape, round_to_nearest
from stages.m7_gptq.grid import fit_grid
from stages.m7_gptq.settings import Settings


def plain(**options: object) -> Settings:
    return Settings(**({"search": False} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight = torch.randn(64, 5) + 0.3
    grid = fit_grid(weight, plain(bits=bits, symmetric=symmetric))
    error = (grid.values(grid.codes(weight)) - weight).abs()
    # symmetric: the outermost positive weight is one code short. Asymmetric: the zero point was rounded.
    assert bool((error <= grid.scale * 1.01).all())
    assert float((error / grid.scale).mean()) < 0.3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("low", "high"), [(5.0, 6.0), (-6.0, -5.0), (-10.0, 1.0)])
def test_grids_reach_zero_where_groups_do_not_lie_around_it(low: float, high: float, symmetric: bool) -> None:
    """A grid has to reach 0, since the zero point is a code; a symmetric one reaches as far on both sides."""
    weight = torch.linspace(low, high, 32)[:, None].repeat(1, 2)
    grid = fit_grid(weight, plain(symmetric=symmetric))
    assert bool((grid.zero >= 0).all()) and bool((grid.zero <= 15).all())
    assert not symmetric or bool((grid.zero == 8).all())
    assert bool(((grid.values(grid.codes(weight)) - weight).abs() <= grid.scale * 1.01).all())


@pytest.mark.parametrize("size", [0.0, 1e-10])
def test_groups_of_nothing_or_next_to_nothing_have_a_scale_above_zero(size: float) -> None:
    """A scale of 0, or one that float16 rounds to 0, would make NaN."""
    grid = fit_grid(torch.full((32, 2), size), plain())
    assert bool((grid.scale == (1.0 if size == 0 else 2.0**-24)).all())
    assert bool((grid.values(grid.codes(torch.full((32, 2), size))).abs() <= grid.scale).all())


def test_the_search_finds_the_best_grid() -> None:
    """Against every share and both zero points beside the ideal one, tried one by one."""
    weight = torch.randn(32, 1, generator=torch.Generator().manual_seed(3))
    weight[0] = 4.0
    best = float("inf")
    for step in range(33):
        share = 1.05 - step / 64
        scale = ((weight.max() - weight.min()) * share / 15).half().float()
        for zero in (torch.floor(-weight.min() * share / scale), torch.ceil(-weight.min() * share / scale)):
            codes = (weight / scale).round().add(zero).clamp(0, 15)
            best = min(best, float(((codes - zero) * scale - weight).square().sum()))
    grid = fit_grid(weight, plain(search=True))
    assert float((grid.values(grid.codes(weight)) - weight).square().sum()) == pytest.approx(best, rel=1e-5)


def test_scales_are_ones_that_float16_holds() -> None:
    grid = fit_grid(torch.randn(32, 7), plain())
    assert torch.equal(grid.scale, grid.scale.half().float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    weight = round_to_nearest(torch.zeros(8, 64), plain(symmetric=symmetric))
    assert not bool(weight.dequantize().any())


def test_weights_on_an_integer_grid_are_kept_exactly() -> None:
    codes = torch.randint(0, 16, (16, 64)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 5) * 0.25
    result = round_to_nearest(weight, plain(symmetric=False, group_size=64))
    assert torch.equal(result.dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_lowers_the_error_for_every_output(symmetric: bool) -> None:
    weight = torch.randn(64, 50)
    weight[3] *= 6  # outliers, which a grid from end to end pays for
    wide, narrow = (fit_grid(weight, plain(symmetric=symmetric, search=search)) for search in (False, True))
    errors = [(g.values(g.codes(weight)) - weight).square().sum(0) for g in (wide, narrow)]
    assert bool((errors[1] <= errors[0]).all())
    assert float(errors[1].sum()) < 0.97 * float(errors[0].sum())


def test_the_search_spares_what_matters() -> None:
    weight = torch.randn(64, 50)
    weight[3] *= 6
    importance = torch.ones(64)
    importance[3] = 1000
    spared, clipped = (fit_grid(weight, plain(search=True), i) for i in (importance, None))
    error = [float((g.values(g.codes(weight[3])) - weight[3]).square().sum()) for g in (spared, clipped)]
    assert error[0] < error[1]


def test_a_tail_group() -> None:
    weight = torch.randn(8, 192)
    result = round_to_nearest(weight, plain(group_size=128))
    assert result.groups == 2
    alone = round_to_nearest(weight[:, 128:], plain(group_size=128))
    assert torch.equal(result.dequantize()[:, 128:], alone.dequantize())


@pytest.mark.parametrize(
    ("options", "word"),
    [({"bits": 3}, "bits=3"), ({"group_size": 48}, "group_size=48"), ({"damping": 0.0}, "damping")],
)
def test_unsupported_settings_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        plain(**options)


def test_a_shape_without_a_place_in_words_is_refused() -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        check_shape(Settings(), "o_proj", 100, 64)
