"""The online softmax over blocks, one step at a time: one query, one head, scores chosen by hand."""

from __future__ import annotations

import math

import torch

from stages.m4_flash_attention.attention import attend_blocks
from tests.steps import close


def attend(scores: list[float], values: list[float], size: int = 2, table: list[int] | None = None) -> torch.Tensor:
    """The last token's answer: its scores against all tokens, and their values, in blocks of `size` tokens."""
    blocks = -(-len(scores) // size)
    keys, v = torch.zeros(blocks, size, 1, 1), torch.zeros(blocks, size, 1, 1)
    for i, block in enumerate(table or range(blocks)):
        part = slice(i * size, (i + 1) * size)
        keys[block, : len(scores[part]), 0, 0] = torch.tensor(scores[part])
        v[block, : len(scores[part]), 0, 0] = torch.tensor(values[part])
    out = attend_blocks(torch.ones(1, 1, 1), len(scores) - 1, keys, v, table or list(range(blocks)))
    return out.flatten()


def softmax(scores: list[float], values: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)]


def test_within_one_block_it_is_a_softmax() -> None:
    got = attend([1.0, 0.0], [10.0, 20.0])
    close("scores 1, 0 in one block, values 10, 20", got, softmax([1, 0], [10, 20]))


def test_large_scores_do_not_overflow() -> None:
    got = attend([200.0, 199.0], [10.0, 20.0])
    close("scores 200, 199 in one block, values 10, 20", got, softmax([200, 199], [10, 20]))


def test_scores_far_below_zero_do_not_vanish() -> None:
    got = attend([-400.0, -401.0], [10.0, 20.0])
    close("scores -400, -401 in one block, values 10, 20", got, softmax([-400, -401], [10, 20]))


def test_the_largest_score_may_be_in_an_earlier_block() -> None:
    got = attend([200.0, 199.0, 0.0, 1.0], [10.0, 20.0, 30.0, 40.0])
    close("scores 200, 199 | 0, 1 in two blocks, values 10, 20 | 30, 40", got,
          softmax([200, 199, 0, 1], [10, 20, 30, 40]))  # fmt: skip


def test_equal_blocks_are_added_up() -> None:
    got = attend([1.0, 1.0, 1.0, 1.0], [10.0, 20.0, 30.0, 40.0])
    close("scores 1, 1 | 1, 1 in two blocks, values 10, 20 | 30, 40: their mean", got, [25.0])


def test_sum_and_weights_are_rescaled_alike() -> None:
    got = attend([0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0])
    close("scores 0, 0 | 3, 3 in two blocks, all values 1: weights add up to 1", got, [1.0])


def test_a_larger_score_in_a_later_block_outweighs_the_earlier_ones() -> None:
    got = attend([0.0, 0.0, 3.0, 3.0], [10.0, 10.0, 20.0, 20.0])
    close("scores 0, 0 | 3, 3 in two blocks, values 10, 10 | 20, 20", got, softmax([0, 0, 3, 3], [10, 10, 20, 20]))


def test_blocks_are_read_in_the_order_of_the_table() -> None:
    scores, values = [0.0, 2.0, 1.0], [10.0, 20.0, 30.0]
    got = attend(scores, values, table=[1, 0])
    close("scores 0, 2 | 1 in the blocks 1 and 0", got, softmax(scores, values))
