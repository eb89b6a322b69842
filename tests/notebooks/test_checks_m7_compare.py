"""Wrong answers to the exercises of m7 and 99, each with the words that lead its author on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from notebooks.checks import compare, m7
from notebooks.exercises import Verdict


def to_whole_zero(weights: torch.Tensor) -> Any:
    """Rounds the zero point, and forgets that 0 belongs to the range."""
    scale = (weights.max() - weights.min()) / 15
    zero = (-weights.min() / scale).round()
    return (weights / scale + zero).round(), scale, zero


def unclamped(weights: torch.Tensor) -> Any:
    low, high = weights.min().clamp(max=0), weights.max().clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (weights / scale).round() + zero, scale, zero


def coarse(weights: torch.Tensor) -> Any:
    """A symmetric grid, whose zero point is always the middle."""
    scale = 2 * weights.abs().max() / 15
    zero = torch.tensor(8.0)
    return ((weights / scale).round() + zero).clamp(0, 15), scale, zero


def alone(columns: torch.Tensor, i: int, rounded: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    columns[i] = rounded
    return columns


def too_early(columns: torch.Tensor, i: int, rounded: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The column is overwritten before its error is taken."""
    columns[i] = rounded
    columns[i + 1 :] -= factor[i, i + 1 :, None] * (columns[i] - rounded) / factor[i, i]
    return columns


def into_the_past(columns: torch.Tensor, i: int, rounded: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    error = (columns[i] - rounded) / factor[i, i]
    columns[i:] -= factor[i, i:, None] * error
    columns[:i] += 0.1
    return columns


Check = Callable[[Any], Verdict]
WRONG: list[tuple[Check, Any, str]] = [
    (m7.bytes_in_4_bits, lambda i, o, g: i * o // 2, "codes alone"),
    (m7.bytes_in_4_bits, lambda i, o, g: i * o // 2 + i // g * o * 20 // 8, "the last one is shorter"),
    (m7.bytes_in_4_bits, lambda i, o, g: i * o // 2 + -(-i // g) * o * 2, "zero points of 4 groups"),
    (m7.four_bits, to_whole_zero, "Does your range include 0"),
    (m7.four_bits, unclamped, "from 0 to 16"),
    (m7.four_bits, coarse, "your step is"),
    (m7.four_bits, lambda weights: weights, "three things"),
    (m7.make_good, alone, "the least possible"),
    (m7.make_good, too_early, "the least possible"),
    (m7.make_good, into_the_past, "i = 3: inputs before it are done"),
    (m7.make_good, lambda *arguments: None, "return"),
    (compare.most_tokens_per_s, lambda r, w, k, f, b, c: r * b / w, "K and V of the other 63"),
    (compare.most_tokens_per_s, lambda r, w, k, f, b, c: r * b / (w + r * k), "arithmetic"),
    (compare.most_tokens_per_s, lambda r, w, k, f, b, c: r / ((w + r * k) / b + r * f / c), "at the same time"),
    (compare.stage_for, dict.fromkeys(compare.PEOPLE, "m7"), "an earlier stage has it already"),
    (compare.stage_for, dict.fromkeys(compare.PEOPLE, "m1"), "m1 has not what it takes"),
    (compare.stage_for, dict.fromkeys(compare.PEOPLE, "m8"), "no stage"),
    (compare.stage_for, {"Who?": "m1"}, "Leave the questions"),
    (compare.speedup, lambda share, factor: 1 - share + share * factor, "75.0 ms"),
    (compare.speedup, lambda share, factor: 1 / (1 - share), "75.0 ms"),
]


@pytest.mark.parametrize(("judge", "answer", "words"), WRONG)
def test_wrong_answers_are_told_what_is_wrong(judge: Check, answer: Any, words: str) -> None:
    verdict = judge(answer)
    assert not verdict.right
    assert words in verdict.message
