"""Text a token at a time, with the embedded model's real tokenizer."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from common.text.detokenizer import Detokenizer
from common.text.tokenizer import Tokenizer

TEXTS = [
    "Plain words, then a line\nand  two spaces.",
    "🤖👩‍👩‍👧‍👦 🇩🇪 family",
    "今天天气很好，我们去公园吧。",
    "cafe\u0301 nai\u0308ve \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "ไทย हिन्दी 한국어 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]


def live_texts(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> list[str]:
    """What a reader sees after each token, while more may come."""
    detokenizer = Detokenizer(tokenizer.backend, 0, stop, min_tokens)
    return [detokenizer.text(ids[:count], count, finished=False) for count in range(1, len(ids) + 1)]


@pytest.mark.parametrize("text", TEXTS)
def test_half_a_character_is_never_shown(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    live = live_texts(tokenizer, ids)
    assert not any("\ufffd" in shown for shown in live)
    for earlier, later in pairwise(live):
        assert later.startswith(earlier)
    assert live[-1] == tokenizer.decode(ids) == text


def test_some_of_these_tokens_do_hold_half_a_character(tokenizer: Tokenizer) -> None:
    """Without this, the test above could not fail."""
    for text in TEXTS[1:3]:
        assert any("\ufffd" in tokenizer.decode([i]) for i in tokenizer.encode(text))


def test_any_tokens_at_all_concatenate_to_what_decode_gives(tokenizer: Tokenizer) -> None:
    """Random tokens, every second time mostly broken bytes, as a random model writes them."""
    rng = random.Random(0)
    broken = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    for trial in range(150):
        pick = (lambda: rng.choice(broken)) if trial % 2 else (lambda: rng.randrange(tokenizer.vocab_size))
        ids = [pick() if rng.random() < 0.6 else rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 40))]
        detokenizer = Detokenizer(tokenizer.backend, 0)
        shown = ""
        for count in range(1, len(ids) + 1):
            text = detokenizer.text(ids[:count], count, finished=False)
            assert text.startswith(shown)
            shown = text
        whole = detokenizer.text(ids, len(ids), finished=True)
        assert whole == tokenizer.decode(ids)
        assert whole.startswith(shown)


def test_an_output_cut_inside_a_character_ends_like_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🤖")[:-1]
    detokenizer = Detokenizer(tokenizer.backend, 0)
    assert "\ufffd" not in detokenizer.text(ids, len(ids), finished=False)
    assert detokenizer.text(ids, len(ids), finished=True) == tokenizer.decode(ids)


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.backend.token_to_id("<|im_end|>")
    ids = [*tokenizer.encode("Hello"), end]
    assert live_texts(tokenizer, ids)[-1] == "Hello"


def test_the_prompt_is_not_decoded(tokenizer: Tokenizer) -> None:
    prompt, output = tokenizer.encode("The capital of France is"), tokenizer.encode(" Paris.")
    detokenizer = Detokenizer(tokenizer.backend, len(prompt))
    assert detokenizer.text(prompt, 0, finished=False) == ""
    assert detokenizer.text(prompt + output, len(output), finished=True) == " Paris."


def stopped(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[str, int]:
    """Text at the stop, and the number of tokens after which it was found (0: never)."""
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer.backend, 0, stop)
    for count in range(1, len(ids) + 1):
        if detokenizer.finds_stop(ids[:count]):
            return detokenizer.text(ids[:count], count, finished=True), count
    return detokenizer.text(ids, len(ids), finished=True), 0


def test_a_stop_string_within_a_token_and_across_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" wonderful")) == 1
    assert stopped(tokenizer, "a wonderful day", "onder")[0] == "a w"
    assert stopped(tokenizer, "one two three four five", "o three f")[0] == "one tw"
    assert stopped(tokenizer, "今天天气很好", "天气")[0] == "今天"


def test_generation_ends_with_the_token_that_completes_the_stop_string(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four five")
    text, count = stopped(tokenizer, "one two three four five", "three")
    assert text == "one two " and tokenizer.decode(ids[:count]) == "one two three"


def test_of_several_stop_strings_the_earliest_wins(tokenizer: Tokenizer) -> None:
    for stops in (("four", "two"), ("two", "four")):
        assert stopped(tokenizer, "one two three four", *stops)[0] == "one "
    assert stopped(tokenizer, "one two three four", "three", "two three", "wo")[0] == "one t"
    assert stopped(tokenizer, "a wonderful day", "ful", "won", "der")[0] == "a "
    assert stopped(tokenizer, "no such thing", "zebra")[1] == 0


def test_the_beginning_of_a_stop_string_is_held_back_then_released(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")
    live = live_texts(tokenizer, ids, (" two four",))
    assert all(" two" not in shown for shown in live[:2])
    assert live[-1] == "one two three"  # ' three' cannot belong to the stop string: all is shown again
    half = Detokenizer(tokenizer.backend, 0, (" three four",))
    assert half.text(ids, len(ids), finished=False) == "one two"
    assert half.text(ids, len(ids), finished=True) == "one two three"


def test_no_part_of_a_stop_string_is_ever_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The answer is forty-two.\n\nQuestion: what next?")
    for stop in ("\n\nQuestion:", "forty-two.\n\n", "\n", "Question"):
        for shown in live_texts(tokenizer, ids, (stop,)):
            assert "The answer is forty-two.\n\nQuestion: what next?".split(stop)[0].startswith(shown)


def test_text_of_a_count_is_stable_whatever_came_later(tokenizer: Tokenizer) -> None:
    """The same counts, asked while the tokens come, and only after the last: also where two stop strings compete."""
    for text, stop in (
        ("one two three four", ("three",)),
        ("say abx now", ("abcd", "bx")),
        ("今天天气很好 🤖 yes", ("yes",)),
    ):
        ids = tokenizer.encode(text)
        if text.startswith("say"):
            ids = [i for letter in text for i in tokenizer.encode(letter)]
        live = live_texts(tokenizer, ids, stop)
        late = Detokenizer(tokenizer.backend, 0, stop)
        late.finds_stop(ids)
        assert [late.text(ids, count, finished=False) for count in range(1, len(ids) + 1)] == live


def test_a_stop_string_before_min_tokens_does_not_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three one two three")
    assert len(ids) == 6
    detokenizer = Detokenizer(tokenizer.backend, 0, ("two",), min_tokens=4)
    assert [detokenizer.finds_stop(ids[:n]) for n in range(4, 7)] == [False, True, True]
    assert detokenizer.text(ids, 5, finished=True) == "one two three one "
