"""Text a token at a time, with the embedded model's real tokenizer."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from common.text.detokenizer import Detokenizer
from common.text.tokenizer import Tokenizer
from tests.variants.tokenizers import trained

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


# -- behind a prompt ---------------------------------------------------------------------------------------------------

METASPACE = ("always", "first", "never")
KINDS = ["byte-level", "sentencepiece", "unigram", "wordpiece", "suffixes", "no decoder", *METASPACE]
SENTENCE = (
    "The capital of France is Paris, isn't it?  Two  spaces, naïve café 今天天气很好 🤖 x ** 2\n\n  end <s></s> there"
)


def backend_of(kind: str) -> FastTokenizer:
    if kind == "suffixes":
        backend = FastTokenizer(models.WordLevel({f"{word}</w>": i for i, word in enumerate(SENTENCE.split())}, "?"))
        backend.decoder = decoders.BPEDecoder("</w>")
        return backend
    backend = FastTokenizer.from_str(trained("sentencepiece" if kind in (*METASPACE, "no decoder") else kind))
    if kind in METASPACE:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind)])
    if kind == "no decoder":
        state = json.loads(backend.to_str())
        backend = FastTokenizer.from_str(json.dumps(state | {"decoder": None}))
    return backend


def ids_of(kind: str, backend: FastTokenizer) -> list[int]:
    return list(range(len(SENTENCE.split()))) if kind == "suffixes" else backend.encode(SENTENCE).ids


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_text_of_all_tokens(kind: str) -> None:
    """Wherever the prompt ends: at a space, in half a character, behind special tokens, or before anything."""
    backend = backend_of(kind)
    ids = ids_of(kind, backend)
    whole = backend.decode(ids)
    for end in range(len(ids) + 1):
        prompt = backend.decode(ids[:end])
        if not whole.startswith(prompt):
            prompt = prompt.rstrip("\ufffd")  # the character that it began is the completion's
        assert whole.startswith(prompt)
        at_once, stepwise = Detokenizer(backend, end), Detokenizer(backend, end)
        completion = at_once.text(ids, len(ids) - end, finished=True)
        assert prompt + completion == whole, (end, prompt, completion)
        shown = ""
        for count in range(1, len(ids) - end + 1):
            text = stepwise.text(ids[: end + count], count, finished=False)
            assert text.startswith(shown) and "\ufffd" not in text
            shown = text
        assert shown == completion


def id_of(backend: FastTokenizer, piece: str) -> int:
    token_id = backend.token_to_id(piece)
    assert token_id is not None
    return token_id


def test_the_first_space_is_kept_behind_any_prompt() -> None:
    backend = FastTokenizer.from_str(trained("sentencepiece"))
    says = [id_of(backend, piece) for piece in ("▁The", "▁ca", "pit", "al")]
    bos, words = 1, backend.encode("of France", add_special_tokens=False).ids
    for prompt, space in (
        ([], ""),
        ([bos], ""),
        (words, " "),
        ([bos, *words, *[2, bos] * 20], " "),
        (words * 5000, " "),
    ):
        detokenizer = Detokenizer(backend, len(prompt), ("capital",))
        assert detokenizer.text(prompt + says, 1, finished=True) == f"{space}The"
        assert Detokenizer(backend, len(prompt)).text(prompt + says, 4, finished=True) == f"{space}The capital"
    detokenizer = Detokenizer(backend, len(words), (" The",))
    assert detokenizer.finds_stop(words + says[:1]), "a stop string may begin with that space"


def test_broken_bytes_between_whole_ones_are_no_error() -> None:
    """Of a run of byte tokens that is no UTF-8 each becomes a replacement character, also what was a letter alone."""
    backend = FastTokenizer.from_str(trained("sentencepiece"))
    byte = {name: id_of(backend, f"<0x{name}>") for name in ("41", "E2", "82", "AC")}
    broken = [byte["41"], byte["E2"], id_of(backend, "▁The"), byte["E2"], byte["82"], byte["AC"]]
    detokenizer = Detokenizer(backend, 0)
    shown = [detokenizer.text(broken[:n], n, finished=False) for n in range(1, 7)]
    assert shown == ["A", "A", "A\ufffd The", "A\ufffd The", "A\ufffd The", "A\ufffd The€"]


def test_a_long_prompt_is_not_decoded() -> None:
    backend = FastTokenizer.from_str(trained("sentencepiece"))
    prompt, decoded = backend.encode("The capital of France", add_special_tokens=False).ids * 1000, 0

    class Counted:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal decoded
            decoded += len(ids)
            return backend.decode(ids, skip_special_tokens=skip_special_tokens)

    counted: Any = Counted()
    assert Detokenizer(counted, len(prompt)).text([*prompt, prompt[0]], 1, finished=True) == " The"
    assert decoded < 40


SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS: dict[str, tuple[str, Any]] = {
    "bytes": ("byte-level", None),
    "Llama-2": ("sentencepiece", None),
    "Gemma": ("sentencepiece", decoders.Sequence(SENTENCEPIECE)),
    "three spaces": ("sentencepiece", decoders.Sequence([*SENTENCEPIECE, decoders.Strip(content=" ", left=3)])),
    "unigram": ("unigram", None),
    "words": ("wordpiece", None),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_split_of_a_text_continues_the_prompt(kind: str) -> None:
    """The completion of every prompt, a token at a time: with the prompt's whole characters it is the whole text."""
    name, decoder = DECODERS[kind]
    backend = FastTokenizer.from_str(trained(name))
    backend.decoder = decoder or backend.decoder
    rng = random.Random(0)
    alphabet = ["🤖", "👩", "é", "好", " ", "  ", "a", "The", "\n", "ȇ"]
    for _ in range(40):
        ids = backend.encode("".join(rng.choices(alphabet, k=7)), add_special_tokens=False).ids
        whole = backend.decode(ids)
        for end in range(len(ids) + 1):
            detokenizer, shown = Detokenizer(backend, end), ""
            for count in range(1, len(ids) - end + 1):
                text = detokenizer.text(ids, count, finished=False)
                assert text.startswith(shown)
                shown = text
            prompts = [backend.decode(ids[:n]).rstrip("\ufffd") for n in range(end + 1)]
            prompts += [backend.decode(ids[:end])] * (end == len(ids))
            prompt = max((text for text in prompts if whole.startswith(text)), key=len)  # its whole characters
            assert prompt + detokenizer.text(ids, len(ids) - end, finished=True) == whole, (ids, end)


@pytest.mark.parametrize("kind", ["bytes", "Llama-2", "Gemma"])
def test_a_valid_text_in_single_bytes_is_never_eaten(kind: str) -> None:
    name, decoder = DECODERS[kind]
    backend = FastTokenizer.from_str(trained(name))
    backend.decoder = decoder or backend.decoder
    octets = "ȇX🤖é👩好".encode()
    characters = sorted({*range(33, 127), *range(161, 173), *range(174, 256)})
    spare = [octet for octet in range(256) if octet not in characters]
    piece = {octet: chr(octet) if octet in characters else chr(256 + spare.index(octet)) for octet in range(256)}
    names = [piece[octet] if kind == "bytes" else f"<0x{octet:02X}>" for octet in octets]
    ids = [i for text in names if (i := backend.token_to_id(text)) is not None]
    assert backend.decode(ids) == "ȇX🤖é👩好"
    for end in range(len(ids)):
        prompt = backend.decode(ids[:end])
        prompt = prompt if "ȇX🤖é👩好".startswith(prompt) else octets[:end].decode(errors="ignore")
        assert prompt + Detokenizer(backend, end).text(ids, len(ids) - end, finished=True) == "ȇX🤖é👩好", end
