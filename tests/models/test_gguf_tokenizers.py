"""Tokenizers of GGUF files, held to what llama.cpp makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common import UserError
from common.models import load_model, load_tokenizer
from common.text.tokenizer import Tokenizer
from tests.helpers import all_logits
from tests.models import expected_tokens, gguf_writer, reference
from tests.models.tokenizer_cases import CASES, TEXTS, byte_level_metadata, sentencepiece_metadata

SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPECTED: dict[str, list[list[int]]] = json.loads(expected_tokens.KEPT.read_text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def write(path: Path, metadata: dict[str, Any], rows: int | None = None, drop: tuple[str, ...] = ()) -> None:
    """A small model with that tokenizer."""
    size = rows or len(metadata["tokenizer.ggml.tokens"])
    drop = ("tokenizer.ggml.eot_token_id", *drop)
    theirs = reference.make("llama, 3 queries a KV head", vocab_size=size, **SMALL)
    gguf_writer.write(theirs, path, extra=metadata, drop=drop)


def load(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(str(path))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_llama_cpp(case: str, path: Path) -> None:
    """As kept in expected_tokens.json."""
    drop = tuple(k for k in ("tokenizer.ggml.eos_token_id",) if k not in CASES[case])
    write(path, CASES[case], drop=drop)
    tokenizer = load(path)
    for text, token_ids in zip(TEXTS, EXPECTED[case], strict=True):
        assert tokenizer.encode(text) == token_ids, text


def test_the_kept_tokens_are_those_of_the_installed_llama_cpp() -> None:
    pytest.importorskip("llama_cpp")
    for case in ("byte-level, pre deepseek-llm", "SentencePiece", "SentencePiece, no prefix"):
        assert expected_tokens.tokens_of_llama_cpp(CASES[case]) == EXPECTED[case]


@pytest.mark.parametrize("case", ["byte-level, pre qwen2", "SentencePiece", "SentencePiece, no prefix"])
def test_decoding_gives_the_text_back(case: str, path: Path) -> None:
    write(path, CASES[case])
    tokenizer = load(path)
    for text in TEXTS:
        if "<" not in text:  # control tokens are left out
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["hello", "Ġ", "1", "2", "3"]),
        ("gpt-2", ["hello", "Ġ", "123"]),
        ("llama-bpe", ["<|start|>", "hello", "Ġ", "123"]),
    ],
)
def test_numbers_are_cut_as_the_pre_tokenizer_says(pre: str, pieces: list[str], path: Path) -> None:
    write(path, byte_level_metadata(pre))
    tokenizer = load(path)
    assert [tokenizer.backend.id_to_token(t) for t in tokenizer.encode("hello 123")] == pieces


def test_special_and_added_tokens_are_kept_whole(path: Path) -> None:
    write(path, byte_level_metadata("qwen2"))
    tokenizer = load(path)
    token_ids = tokenizer.encode("<|start|><tool>he<|end|>")
    assert len(token_ids) == 4
    assert tokenizer.decode(token_ids) == "<tool>he"  # a tool call is text, a control token is not


@pytest.mark.parametrize(
    "metadata",
    [
        byte_level_metadata("falcon"),
        byte_level_metadata("qwen2", model="rwkv"),
        sentencepiece_metadata(precompiled_charsmap=[1, 2, 3]),
        sentencepiece_metadata(**{"normalizer.lowercase": True}),
        sentencepiece_metadata(remove_extra_whitespaces=True),
        byte_level_metadata("qwen2", add_sep_token=True),
    ],
)
def test_a_tokenizer_of_another_kind_leaves_token_ids(
    metadata: dict[str, Any], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, metadata)
    assert load_tokenizer(str(path)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompts must be token ids" in line
    assert all_logits(load_model(str(path)), [1, 2]).isfinite().all()


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_missing_pre_tokenizer_is_said(pre: str | None, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, byte_level_metadata(pre))
    load(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not say how its tokenizer cuts words" in line


def test_a_file_without_a_tokenizer_gives_none_in_silence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf_writer.write(reference.make("llama, 3 queries a KV head"), path)
    assert load_tokenizer(str(path)) is None
    assert not capsys.readouterr().err


# -- where an answer ends -------------------------------------------------------------------------------------------


def test_an_answer_ends_at_each_end_token_that_the_file_names(path: Path) -> None:
    metadata = sentencepiece_metadata(eot_token_id=7, eom_token_id=9)
    gguf_writer.write(reference.make("llama, 3 queries a KV head", vocab_size=400), path, extra=metadata)
    assert load_model(str(path)).config.eos_token_ids == (2, 7, 9)
    assert load(path).eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize("token_type", [1, 3, 4])
def test_a_token_that_ends_a_turn_is_a_control_token_without_a_key(token_type: int, path: Path) -> None:
    """Also where its type says that it is text, as llama.cpp has it."""
    metadata = sentencepiece_metadata()
    at = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    metadata["tokenizer.ggml.token_type"][at] = token_type
    write(path, metadata)
    tokenizer = load(path)
    assert tokenizer.encode("<|im_end|>") == [1, at]
    assert tokenizer.decode([at]) == ""
    assert at in tokenizer.turn_end_token_ids


def test_sentencepiece_has_its_end_at_2_without_a_key(path: Path) -> None:
    write(path, sentencepiece_metadata(eos_token_id=None, bos_token_id=None), drop=("tokenizer.ggml.eos_token_id",))
    assert load(path).eos_token_ids == (2,)
    assert load(path).special_tokens["bos_token"] == "<s>"


# -- damaged metadata -----------------------------------------------------------------------------------------------

BYTES = byte_level_metadata("qwen2")
TOKENS: list[str] = BYTES["tokenizer.ggml.tokens"]
PIECES = sentencepiece_metadata()
SCORES: list[float] = PIECES["tokenizer.ggml.scores"]


@pytest.mark.parametrize(
    ("metadata", "key", "value", "named"),
    [
        (BYTES, "bos_token_id", 10**6, "bos_token_id is 1000000"),
        (BYTES, "eos_token_id", 10**6, "eos_token_id is 1000000"),
        (BYTES, "bos_token_id", "0", "bos_token_id must be int"),
        (BYTES, "bos_token_id", True, "bos_token_id must be int"),
        (BYTES, "bos_token_id", 1.0, "bos_token_id must be int"),
        (BYTES, "merges", ["h e", "hello"], "merge 'hello'"),
        (BYTES, "merges", ["h e", "h xyz"], "merge 'h xyz'"),
        (BYTES, "merges", ["h q"], "merge 'h q'"),
        (BYTES, "merges", ["he l l"], "merge 'he l l'"),
        (BYTES, "merges", [1, 2], "merges must be list"),
        (BYTES, "merges", None, "lacks tokenizer.ggml.merges"),
        (BYTES, "token_type", [1] * (len(TOKENS) + 1), "token_type"),
        (BYTES, "token_type", [1] * 3, "token_type"),
        (BYTES, "token_type", [99] * len(TOKENS), "token_type"),
        (BYTES, "token_type", [1.5] * len(TOKENS), "token_type"),
        (BYTES, "token_type", "1", "token_type must be ndarray"),
        (BYTES, "tokens", [*TOKENS[:-1], TOKENS[1]], "1 tokens are there twice"),
        (BYTES, "tokens", [*TOKENS, "more"], "more than"),
        (BYTES, "tokens", list(range(len(TOKENS))), "tokens must be list"),
        (BYTES, "tokens", "abc", "tokens must be list"),
        (BYTES, "add_bos_token", 1, "add_bos_token must be bool"),
        (BYTES, "add_eos_token", "yes", "add_eos_token must be bool"),
        (BYTES | {"tokenizer.ggml.bos_token_id": 2**32 - 1}, "add_bos_token", True, "does not name its BOS"),
        (BYTES, "model", 3, "model must be str"),
        (BYTES, "pre", 3, "pre must be str"),
        (PIECES, "scores", None, "lacks tokenizer.ggml.scores"),
        (PIECES, "scores", SCORES[1:], "scores"),
        (PIECES, "scores", [float("nan"), *SCORES[1:]], "scores"),
        (PIECES, "scores", ["x"] * len(SCORES), "scores must be ndarray"),
        (PIECES, "unknown_token_id", 10**6, "unknown_token_id"),
        (PIECES, "tokens", ["y" * 50_000, *PIECES["tokenizer.ggml.tokens"][1:]], "long"),
    ],
)
def test_damaged_metadata_is_refused_by_its_key(
    metadata: dict[str, Any], key: str, value: Any, named: str, path: Path
) -> None:
    rows = len(metadata["tokenizer.ggml.tokens"])
    changed = {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}
    write(path, changed if value is None else changed | {f"tokenizer.ggml.{key}": value}, rows)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(path))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_is_no_text_is_refused(path: Path) -> None:
    write(path, BYTES | {"tokenizer.chat_template": 3})
    with pytest.raises(UserError, match="chat_template"):
        load_tokenizer(str(path))
