"""The rows of the KV cache and attention over them, one step at a time."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

from common import SamplingParams
from common.batch import RaggedBatch
from common.request import Request
from stages.m1_kv_cache.attention import RowAttention
from stages.m1_kv_cache.kv_cache import RowCache
from tests.steps import close, same


def request(name: str) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(), frozenset(), 0, 0.0)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_request_takes_one_row() -> None:
    cache, one = RowCache(2, 10), request("a")
    same("`grow` of a new request to 3 tokens", cache.grow(one, 3), True)
    same("rows in use after it", cache.usage().blocks, 1)
    cache.grow(one, 4)
    same("rows in use after it has grown again", cache.usage().blocks, 1)


def test_growing_keeps_what_is_stored() -> None:
    cache, one = RowCache(2, 10), request("a")
    cache.grow(one, 3)
    same("tokens stored after `grow` to 3 tokens, none computed yet", cache.usage().stored, 0)
    cache.mark_computed(one, 3)
    same("`num_computed_tokens` after `mark_computed(request, 3)`", one.num_computed_tokens, 3)
    cache.grow(one, 4)
    same("tokens stored after it has grown by one that is not computed yet", cache.usage().stored, 3)


def test_no_request_starts_without_a_free_row() -> None:
    cache = RowCache(1, 10)
    cache.grow(request("a"), 3)
    same("`can_admit` with 1 row of 1 in use", cache.can_admit(request("b")), False)
    same("`grow` of a new request then", cache.grow(request("b"), 3), False)
    same("rows in use then", cache.usage().blocks, 1)


def test_no_request_outgrows_its_row() -> None:
    cache, one = RowCache(1, 4), request("a")
    same("`grow` to 4 tokens in a row of 4", cache.grow(one, 4), True)
    same("`grow` to 5 tokens in a row of 4", cache.grow(one, 5), False)


def test_a_freed_row_is_free() -> None:
    cache, one = RowCache(1, 10), request("a")
    cache.grow(one, 3)
    cache.free(one)
    same("`can_admit` after the only request is freed", cache.can_admit(request("b")), True)
    cache.free(one)  # no error


# -- attention --------------------------------------------------------------------------------------------------------


def attention(rows: int = 1) -> RowAttention:
    """One layer, one head of dimension 1, rows of 8 tokens."""
    config = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=1)
    model: Any = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    return RowAttention(model, rows, 8)


def step(a: RowAttention, positions: list[list[int]], values: list[list[float]], length: int) -> list[float]:
    """One step with equal scores: each query answers with the mean of the values that it sees. [rows][tokens]."""
    flat = torch.tensor([value for row in values for value in row]).view(-1, 1, 1)
    rows, tokens = len(positions), len(positions[0])
    where = torch.tensor([p for row in positions for p in row])
    ends = torch.tensor([row[-1] + 1 for row in positions])
    a.begin(RaggedBatch(torch.zeros_like(where), where, torch.arange(rows + 1) * tokens, ends, torch.arange(rows),
                        max_query_len=tokens, max_seq_len=length))  # fmt: skip
    return [round(float(x), 3) for x in a.attend(0, 0 * flat, 0 * flat, flat).flatten()]


def test_new_keys_and_values_go_to_their_positions() -> None:
    a = attention()
    step(a, [[0, 1, 2]], [[1.0, 2.0, 3.0]], 3)
    close("values in the row after a prompt of three", a._kv[0, 1, 0, 0, :3, 0], [1.0, 2.0, 3.0])
    with suppress(RuntimeError):  # what a decode answers is for the tests below
        step(a, [[3]], [[4.0]], 4)
    close("values in the row after one more token", a._kv[0, 1, 0, 0, :4, 0], [1.0, 2.0, 3.0, 4.0])


def test_each_request_has_a_row_of_its_own() -> None:
    a = attention(rows=2)
    step(a, [[0, 1], [0, 1]], [[1.0, 2.0], [5.0, 6.0]], 2)
    close("values in row 0", a._kv[0, 1, 0, 0, :2, 0], [1.0, 2.0])
    close("values in row 1", a._kv[0, 1, 1, 0, :2, 0], [5.0, 6.0])


def test_a_decode_sees_all_tokens_before_it() -> None:
    a = attention()
    step(a, [[0, 1]], [[1.0, 2.0]], 2)
    same("a decode after a prompt with the values 1 and 2, its own 6", step(a, [[2]], [[6.0]], 3), [3.0])


def test_a_prompt_does_not_see_later_tokens() -> None:
    got = step(attention(), [[0, 1, 2]], [[1.0, 2.0, 6.0]], 3)
    same("a prompt with the values 1, 2, 6: means of what came so far", got, [1.0, 1.5, 3.0])


def test_places_that_are_not_written_are_not_seen() -> None:
    """A shorter row beside a longer one: the end of its row holds what was there before."""
    a = attention(rows=2)
    a._kv.fill_(1000.0)
    step(a, [[0, 1, 2], [0, 1, 2]], [[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]], 3)
    a._kv[:, 1, 1, :, 1:] = 1000.0
    got = step(a, [[3], [1]], [[6.0], [6.0]], 4)
    same("decodes at positions 3 and 1; row 1 has 1000 behind its last token", got, [3.0, 5.0])
