"""The policies of long_context against caches that decode token by token; speculation; and its exercise."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.models import load_model
from common.models.layers import RotaryEmbedding, rotate
from notebooks.checks import long_context as check
from notebooks.pairs import source_path

LENGTH, SIZE = 24, 8
Seen = list[tuple[int, torch.Tensor, torch.Tensor]]
"""Of one head, the tokens in its cache: position in the text, K unrotated, V."""


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """The notebook's functions, on a tiny random model; the rest of its cells is not run."""
    model = load_model("random:tiny-llama")
    config = model.config
    names: dict[str, Any] = {"torch": torch, "rotate": rotate, "model": model, "D": config.head_dim}
    names["GROUP"] = config.num_heads // config.num_kv_heads
    names["rope"] = RotaryEmbedding(replace(config, max_position_embeddings=40_000), torch.float32, model.device)
    tree = ast.parse(source_path("long_context").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "blocks_needed"]
    exec(compile(tree, "long_context.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


class Decoding:
    """Token by token, with a list of tokens for each layer and KV head: what the notebook does in one pass.

    in_cache: positions are counted in the list. drop(seen, weights so far by position) -> the index to drop.
    """

    def __init__(self, notebook: dict[str, Any], drop: Callable[[Seen, dict[int, float]], int], in_cache: bool) -> None:
        self.notebook, self.drop, self.in_cache = notebook, drop, in_cache
        self.caches: dict[tuple[int, int], tuple[Seen, dict[int, float]]] = {}
        self.position = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turn, group, output = self.notebook["turn"], self.notebook["GROUP"], torch.empty_like(q)
        for head in range(k.shape[1]):
            seen, totals = self.caches.setdefault((layer, head), ([], {}))
            if len(seen) == SIZE:
                del seen[self.drop(seen, totals)]
            seen.append((self.position, k[0, head], v[0, head]))
            where = torch.arange(len(seen)) if self.in_cache else torch.tensor([position for position, _, _ in seen])
            keys = turn(torch.stack([key for _, key, _ in seen]), where)
            queries = turn(q[0, head * group : (head + 1) * group, None], where[-1:])[:, 0]
            weights = (queries @ keys.T * q.shape[-1] ** -0.5).softmax(-1)
            output[0, head * group : (head + 1) * group] = weights @ torch.stack([value for _, _, value in seen])
            for (position, _, _), weight in zip(seen, weights.sum(0).tolist(), strict=True):
                totals[position] = totals.get(position, 0.0) + weight
        return output

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        model, rows = self.notebook["model"], list[torch.Tensor]()
        for self.position, token in enumerate(ids):
            hidden = model(token[None], torch.zeros(1, dtype=torch.long), self.attend)
            rows.append(model.logits(hidden).softmax(-1)[0])
        return torch.stack(rows)


def lightest(seen: Seen, totals: dict[int, float]) -> int:
    """H2O: of all but the most recent SIZE / 2 - 1, which the next token joins, the one with the smallest total."""
    old = range(len(seen) - SIZE // 2 + 1)
    return min(old, key=lambda i: totals[seen[i][0]])


@pytest.mark.parametrize(
    ("policy", "drop", "in_cache"),
    [
        (lambda n: n["masked"](SIZE), lambda seen, totals: 0, True),
        (lambda n: n["masked"](SIZE), lambda seen, totals: 0, False),
        (lambda n: n["masked"](SIZE, 4), lambda seen, totals: 4, True),
        (lambda n: n["masked"](SIZE, 4, in_cache=False), lambda seen, totals: 4, False),
        (lambda n: n["heavy_hitters"](SIZE), lightest, False),
    ],
)
def test_one_pass_equals_decoding_token_by_token(
    notebook: dict[str, Any], text: torch.Tensor, policy: Any, drop: Any, in_cache: bool
) -> None:
    got = notebook["next_tokens"](notebook["model"], text, policy(notebook))
    for ids, row in zip(text, got, strict=True):
        torch.testing.assert_close(row, Decoding(notebook, drop, in_cache).run(ids), atol=1e-5, rtol=1e-3)


def test_with_room_for_all_tokens_every_policy_is_dense(notebook: dict[str, Any], text: torch.Tensor) -> None:
    model, masked = notebook["model"], notebook["masked"]

    def dense(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ).transpose(0, 1)  # fmt: skip

    wanted = torch.stack([model.logits(model(ids, torch.arange(LENGTH), dense)).softmax(-1) for ids in text])
    for policy in (masked(), masked(LENGTH), masked(LENGTH, 4), notebook["heavy_hitters"](LENGTH)):
        got = notebook["next_tokens"](model, text, policy, 3)
        torch.testing.assert_close(got, wanted[:, 3:], atol=1e-5, rtol=1e-3)


def test_positions_in_the_cache_do_not_know_how_much_was_dropped(notebook: dict[str, Any], text: torch.Tensor) -> None:
    model, masked = notebook["model"], notebook["masked"]
    later = torch.arange(LENGTH) + torch.where(torch.arange(LENGTH) < 4, 0, 30_000)
    now, then, outside = (
        notebook["next_tokens"](model, text, masked(SIZE, 4, positions, in_cache), LENGTH // 2)
        for positions, in_cache in ((None, True), (later, True), (later, False))
    )
    torch.testing.assert_close(now, then, atol=1e-4, rtol=1e-2)
    assert (now - outside).abs().max() > 10 * (now - then).abs().max()


def test_only_the_residual_makes_speculation_exact(notebook: dict[str, Any]) -> None:
    torch.manual_seed(3)
    p = torch.cat((torch.rand(50, dtype=torch.float64), torch.full((9,), 1e-5, dtype=torch.float64)))  # and rare ones
    p, q = p / p.sum(), (p * torch.linspace(0.2, 3, 59)) / (p * torch.linspace(0.2, 3, 59)).sum()
    value, freedom, chance = notebook["chi_squared"](notebook["speculate"](p, q, (p - q).clamp(min=0)), p)
    assert 40 < freedom < 51
    assert 10 < value < 100
    assert chance > 1e-3
    assert notebook["chi_squared"](notebook["speculate"](p, q, p), p)[2] < 1e-6


def test_chi_squared_by_hand(notebook: dict[str, Any]) -> None:
    drawn, p = torch.tensor([0] * 60 + [1] * 38 + [2] * 2), torch.tensor([0.5, 0.48, 0.02], dtype=torch.float64)
    value, freedom, chance = notebook["chi_squared"](drawn, p)
    assert value == pytest.approx(10**2 / 50 + 10**2 / 48)
    assert freedom == 2
    assert chance == pytest.approx(torch.exp(torch.tensor(-value / 2)).item())  # with two degrees of freedom


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda length, sinks, window, block: -(-(sinks + window) // block), "Where does the window begin"),
        (lambda length, sinks, window, block: -(-length // block), "160 tokens"),
        (lambda length, sinks, window, block: None, "return"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(answer: Any, words: str) -> None:
    verdict = check.blocks_needed(answer)
    assert not verdict.right
    assert words in verdict.message
