"""Attention, rotary embedding and top-p, one step at a time, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.batch import RaggedBatch
from common.models.config import ModelConfig
from common.models.layers import RotaryEmbedding, inverse_frequencies, rotate
from common.models.sources.random_weights import PRESETS
from common.sampling.adjust import filter_logits
from stages.m0_baseline.attention import FullAttention
from tests.steps import close, same

# -- attention --------------------------------------------------------------------------------------------------------


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D], of `rows` rows of equal length."""
    tokens = len(q)
    length = tokens // rows
    none = torch.zeros(rows, dtype=torch.long)
    attention = FullAttention()
    attention.begin(RaggedBatch(torch.zeros(tokens, dtype=torch.long), torch.arange(length).repeat(rows),
                                torch.arange(rows + 1) * length, none + length, none,
                                max_query_len=length, max_seq_len=length))  # fmt: skip
    return attention.attend(0, q, k, v)


def test_a_token_alone_attends_to_itself() -> None:
    q, k = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    v = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    close("one token, 2 heads: its weight is 1, so the answer is v", attend(q, k, v), v)


def test_query_heads_share_key_value_heads_in_groups() -> None:
    v = torch.tensor([[[1.0], [2.0]]])
    got = attend(torch.ones(1, 4, 1), torch.ones(1, 2, 1), v)
    close("4 query heads, 2 KV heads with the values 1 and 2", got, torch.tensor([[[1.0], [1.0], [2.0], [2.0]]]))


def test_a_querys_weights_add_up_to_one() -> None:
    v = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    got = attend(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), v)
    close("the last of 3 tokens with equal scores, values 1, 2, 3: their mean", got[2, 0], [2.0])


def test_no_query_sees_a_later_token() -> None:
    v = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    got = attend(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), v)
    close("3 tokens with equal scores, values 1, 2, 3: means of what came so far", got[:, 0, 0], [1.0, 1.5, 2.0])


def test_keys_are_shared_in_the_same_groups() -> None:
    k, v = torch.tensor([[[0.0], [50.0]], [[50.0], [0.0]]]), torch.tensor([[[1.0], [1.0]], [[2.0], [2.0]]])
    got = attend(torch.ones(2, 4, 1), k, v)[1, :, 0]
    close("4 query heads, 2 KV heads, of which the one sees the second token and the other the first", got,
          [2.0, 2.0, 1.0, 1.0])  # fmt: skip


def test_scores_are_divided_by_the_root_of_the_dimension() -> None:
    """Scores 4 and 0 over sqrt(4) are 2 and 0."""
    q = torch.tensor([[[0.0] * 4], [[1.0] * 4]])
    k, v = torch.tensor([[[1.0] * 4], [[0.0] * 4]]), torch.zeros(2, 1, 4)
    v[0, 0, 0] = 1
    share = math.exp(2) / (math.exp(2) + 1)
    close("weight of the first of 2 tokens, q k = 4 and 0, D = 4", attend(q, k, v)[1, 0, :1], [share])


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    v = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(4, 1, 1)
    got = attend(torch.zeros(4, 1, 1), torch.zeros(4, 1, 1), v, rows=2)
    close("2 rows of 2 tokens, values 1, 3 and 10, 30", got[:, 0, 0], [1.0, 2.0, 10.0, 20.0])


# -- rotary embedding -------------------------------------------------------------------------------------------------


def rotary(dim: int = 4, theta: float = 10_000.0) -> RotaryEmbedding:
    return RotaryEmbedding(config(dim, theta), torch.float32, torch.device("cpu"))


def config(dim: int, theta: float) -> ModelConfig:
    from dataclasses import replace

    return replace(PRESETS["tiny-llama"], head_dim=dim, rope_theta=theta, rope_scaling=None)


def turn(x: list[float], position: int) -> torch.Tensor:
    """One head of one token at a position."""
    return rotate(torch.tensor([[x]]), *rotary(len(x)).at(torch.tensor([position])))[0, 0]


def test_each_pair_turns_slower_than_the_last() -> None:
    close("frequencies of D = 4, theta = 10,000: theta^0 and theta^(-2/4)",
          inverse_frequencies(config(4, 10_000.0)), [1.0, 0.01])  # fmt: skip


def test_position_0_is_not_turned() -> None:
    close("(1, 2, 3, 4) at position 0", turn([1.0, 2.0, 3.0, 4.0], 0), [1.0, 2.0, 3.0, 4.0])


def test_turning_changes_no_length() -> None:
    got = turn([3.0, 0.0, 4.0, 0.0], 7)
    close("the length of (3, 0, 4, 0) at position 7", got.norm()[None], [5.0])


def test_dimension_i_turns_with_dimension_i_and_a_half() -> None:
    c, s = math.cos(1), math.sin(1)
    close("(1, 0, 0, 0) at position 1: dimensions 0 and 2 are a pair", turn([1.0, 0.0, 0.0, 0.0], 1), [c, 0, s, 0])
    close("(0, 0, 1, 0) at position 1", turn([0.0, 0.0, 1.0, 0.0], 1), [-s, 0, c, 0])


def test_a_score_depends_on_the_distance_alone() -> None:
    q, k = [0.3, -1.2, 0.7, 0.4], [1.1, 0.2, -0.5, 0.9]
    scores = [float(turn(q, at + 3) @ turn(k, at)) for at in (0, 5, 90)]
    close("q k at positions 3 and 0, 8 and 5, 93 and 90", torch.tensor(scores), [scores[0]] * 3)


# -- top-p ------------------------------------------------------------------------------------------------------------


def kept(rows: list[list[float]], *top_p: float, top_k: int = 0) -> list[list[int]]:
    """The tokens that are left of rows of probabilities."""
    ones = torch.ones(len(rows), 1)
    ps = torch.tensor(top_p)[:, None]
    left = filter_logits(torch.tensor(rows).log(), ones, ones * (top_k or len(rows[0])), ps, 0 * ones)
    return [[token for token, logit in enumerate(row) if logit > -math.inf] for row in left.tolist()]


def test_the_token_that_crosses_top_p_is_kept() -> None:
    same("tokens kept of 0.5, 0.25, 0.15, 0.1 with top_p 0.55", kept([[0.5, 0.25, 0.15, 0.1]], 0.55), [[0, 1]])
    same("with top_p 0.8", kept([[0.5, 0.25, 0.15, 0.1]], 0.8), [[0, 1, 2]])


def test_no_more_tokens_are_kept_than_top_p_takes() -> None:
    same("tokens kept of 0.25 four times with top_p 0.5, which two reach", kept([[0.25] * 4], 0.5), [[0, 1]])


def test_tokens_are_found_where_they_were() -> None:
    same("tokens kept of 0.1, 0.5, 0.25, 0.15 with top_p 0.55", kept([[0.1, 0.5, 0.25, 0.15]], 0.55), [[1, 2]])


def test_each_row_has_a_top_p_of_its_own() -> None:
    rows = [[0.4, 0.3, 0.2, 0.1]] * 2
    same("tokens kept of 0.4, 0.3, 0.2, 0.1 with top_p 0.35 and 0.85", kept(rows, 0.35, 0.85), [[0], [0, 1, 2]])


def test_top_p_counts_what_top_k_left() -> None:
    same("tokens kept of 0.4, 0.3, 0.2, 0.1 with top_k 2, then top_p 0.55: the first is 4/7 of what is left",
         kept([[0.4, 0.3, 0.2, 0.1]], 0.55, top_k=2), [[0]])  # fmt: skip


@pytest.mark.parametrize("top_p", [1e-9, 1e-46])
def test_the_likeliest_token_is_always_kept(top_p: float) -> None:
    """1e-46 is 0 in float32."""
    same(f"tokens kept of 0.2, 0.5, 0.3 with top_p {top_p}", kept([[0.2, 0.5, 0.3]], top_p), [[1]])
