"""The presets fit the engines that they ask for."""

from __future__ import annotations

import pytest

from common.arena.figures import FIGURES
from common.arena.presets import MOST_PROMPTS, PRESETS, Preset, find, presets_for
from common.config import stage_options
from common.errors import UserError
from common.text.tokenizer import Tokenizer
from stages.__main__ import folders


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_prompts_and_answers_fit(preset: Preset, tokenizer: Tokenizer) -> None:
    assert preset.watch in FIGURES
    assert 1 <= sum(ask.n for ask in preset.asks) <= MOST_PROMPTS
    for ask in preset.asks:
        total = len(tokenizer.chat(ask.messages())) + ask.max_tokens
        assert total <= preset.limits["max_model_len"], (ask.title, total)
        assert total * ask.n <= preset.limits["kv_tokens"]
        assert ask.n <= preset.limits["max_num_seqs"]
    assert preset.limits["kv_tokens"] >= preset.limits["max_model_len"], "room for a row, before m3"
    assert stage_options(7, preset.limits) == preset.limits


def test_the_claims_of_the_presets_are_in_their_sizes(tokenizer: Tokenizer) -> None:
    long = find("long", [4, 5])
    assert len(tokenizer.chat(long.asks[-1].messages())) > 1000
    assert long.asks[-1].after_tokens is not None
    shared = [tokenizer.chat(ask.messages()) for ask in find("shared", [6]).asks]
    assert len({tuple(prompt[:512]) for prompt in shared}) == 1
    memory = find("memory", [3])
    needed = sum(len(tokenizer.chat(ask.messages())) + ask.max_tokens for ask in memory.asks)
    assert needed > memory.limits["kv_tokens"] > memory.limits["max_model_len"] * 2


def test_titles_of_many_answers_fit_into_a_column() -> None:
    for preset in PRESETS:
        if sum(ask.n for ask in preset.asks) > 4:
            assert max(len(ask.title) for ask in preset.asks) <= 14, preset.key


def test_without_names_two_stages_with_the_same_weights_race() -> None:
    assert folders(None) == ["m1_kv_cache", "m6_prefix_caching"]
    assert folders(["4", "stage7"]) == ["m4_flash_attention", "m7_gptq"]


def test_what_a_stage_cannot_show_is_not_offered() -> None:
    assert "weights" not in [preset.key for preset in presets_for([1, 5])]
    assert "weights" in [preset.key for preset in presets_for([6, 7])]
    with pytest.raises(UserError, match="weights needs m7: make stage6 stage7 race PRESET=weights"):
        find("weights", [1, 5])
    assert find("weights", [6, 7]).key == "weights"
    with pytest.raises(UserError, match="unknown preset 'wights'"):
        find("wights", [6, 7])


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([], "no prompt"), (["  "], "no prompt"), (["x"] * 17, "16 is the most"), (["x" * 8001], "over 8,000 characters")],
)
def test_an_audience_may_ask_for_so_much(prompts: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        find("own", [1, 5], prompts)
    assert [ask.prompt for ask in find("own", [1, 5], ["a ", "", "b"]).asks] == ["a", "b"]
