"""The exercises of m7."""

from collections.abc import Callable

import torch

from notebooks.exercises import check, expect, expect_equal, expect_tensor
from stages.m7_gptq.checkpoint.baselines import round_to_nearest
from stages.m7_gptq.gptq import inverse_factor
from stages.m7_gptq.settings import Settings


@check
def bytes_in_4_bits(answer: Callable[[int, int, int], float]) -> str:
    """answer(inputs, outputs, group_size) -> bytes, held against what the stage packs."""
    for inputs, outputs, group in ((128, 64, 32), (576, 64, 64), (576, 64, 128)):
        weight = round_to_nearest(torch.randn(outputs, inputs), Settings(group_size=group, search=False))
        stored, got = weight.weights_bytes(), answer(inputs, outputs, group)
        codes, groups = inputs * outputs // 2, weight.groups
        hint = f"{codes:,} are codes, {stored - codes:,} the scales and zero points of {groups} groups for each output."
        if got == codes:
            hint = "Yours are the codes alone. What do groups add?"
        elif got == codes + inputs // group * outputs * 20 // 8:
            hint = f"Of the {groups} groups the last one is shorter; it has a scale and a zero point as well."
        expect_equal(got, stored, f"{outputs} × {inputs} in groups of {group}, bytes in m7", hint, ",")
    small, large = (1 - answer(1024, 1024, group) / (2 * 1024 * 1024) for group in (32, 128))
    return f"Not −75 %, but −{small:.1%} with groups of 32 and −{large:.1%} with groups of 128."


@check
def four_bits(answer: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> str:
    """answer(weights [n]) -> codes [n], scale, zero: whole numbers from 0 to 15 that reproduce the weights."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(32, generator=generator)
    cases = {
        "Ordinary weights": ordinary,
        "Weights that are all positive, from 2 to 3": torch.linspace(2, 3, 32),
        "Weights that are all negative": -1 - torch.rand(32, generator=generator),
        "Weights from -7.4 to 7.6 in steps of 1": torch.arange(16) - 7.4,
        "Weights from -7.5 to 7.5 in steps of 1": torch.arange(16) - 7.5,
    }
    for case, weights in cases.items():
        result = answer(weights.clone())
        expect(isinstance(result, tuple) and len(result) == 3, "Return three things: codes, scale, zero.")
        codes, scale, zero = (torch.as_tensor(part, dtype=torch.float32) for part in result)
        expect(codes.shape == weights.shape, f"{case}: {len(weights)} weights, and codes of shape {list(codes.shape)}.")
        expect(bool(torch.isfinite(codes).all()) and float(scale) > 0, f"{case}: codes or scale are not finite.")
        middle, low, high = float(zero), float(codes.min()), float(codes.max())
        expect(middle == round(middle), f"{case}: your zero point is {middle:.3f}. Four bits hold whole numbers.")
        zero_point = f"{case}: your zero point is {middle:.0f}, and four bits hold 0 to 15"
        expect(0 <= middle <= 15, f"{zero_point}. Does your range include 0?")
        expect(bool((codes == codes.round()).all()), f"{case}: your codes are not whole numbers.")
        expect(low >= 0 and high <= 15, f"{case}: your codes go from {low:.0f} to {high:.0f}; four bits hold 0 to 15.")
        far = float(((codes - zero) * scale - weights).abs().max() / scale)
        expect(far < 0.501, f"{case}: a weight comes back {far:.2f} steps off; rounding costs half a step at most.")
        step, enough = float(scale), float(weights.max().clamp(min=0) - weights.min().clamp(max=0)) / 15
        expect(step < 1.01 * enough, f"{case}: your step is {step:.3f}; 15 of {enough:.3f} reach all weights and 0.")
    return "Whole numbers, no weight further off than half a step, and 0 stays 0."


@check
def make_good(answer: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], torch.Tensor]) -> str:
    """answer(columns [in, out], i, rounded [out], factor [in, in]) -> columns after one step."""
    generator = torch.Generator().manual_seed(0)
    together = 2 * torch.randn(64, 1, generator=generator)
    x = torch.randn(64, 6, generator=generator) + together
    hessian = 2 * x.T @ x / len(x)
    factor = inverse_factor(hessian, 1e-6)

    def error(moved: torch.Tensor) -> float:
        return float((x @ moved).square().mean())

    for i in (0, 3):
        columns = torch.randn(6, 4, generator=generator)
        rounded = columns[i].round()
        alone = columns.clone()
        alone[i] = rounded
        best = alone.clone()
        shares = torch.linalg.solve(hessian[i + 1 :, i + 1 :], hessian[i + 1 :, i, None])
        best[i + 1 :] += shares * (columns[i] - rounded)
        got = answer(columns.clone(), i, rounded.clone(), factor.clone())
        expect_tensor(got, columns.shape)
        expect(torch.equal(got[:i], columns[:i]), f"i = {i}: inputs before it are done, and must stay as they are.")
        expect(torch.allclose(got[i], rounded), f"i = {i}: that input's weights are to be `rounded` afterwards.")
        yours, without, least = (error(moved - columns) for moved in (got, alone, best))
        found = f"i = {i} of 6: the outputs' squared error is {yours:.3f} after your step"
        others = f"If the later weights stayed it would be {without:.3f}, and the least possible is {least:.3f}"
        expect(yours < 1.01 * least, f"{found}. {others}. By what is the error divided before it is passed on?")
    return "No other move of the later weights changes the outputs less: it is the least-squares solution."
