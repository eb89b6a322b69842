"""A folder's tokenizer against transformers' `AutoTokenizer`, for all that the files beside tokenizer.json may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common import UserError
from common.text import hf_tokenizer
from common.text.prompts import encode_prompt
from common.text.tokenizer import Tokenizer
from tests.variants.tokenizers import CONFIG, DAMAGED, FOLDERS, NAMES, PROMPTS, token, write


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    assert ours.special_tokens == theirs.special_tokens_map
    for prompt in PROMPTS:
        ids = theirs(prompt)["input_ids"]
        assert ours.encode(prompt) == ids, prompt
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), prompt
        assert ours.decode(ids[1:]) == theirs.decode(ids[1:], skip_special_tokens=True), prompt


PLAIN = [name for name in FOLDERS if name.startswith(("tokenizer.json alone", "nothing new", "add_bos_token"))]


@pytest.mark.parametrize("name", PLAIN)
def test_a_folder_with_nothing_new_is_read_without_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(hf_tokenizer, "_from_transformers")
    assert Tokenizer.from_folder(write(name, tmp_path)) is not None


REFUSED = {  # only transformers finds these
    "a list of objects": (NAMES, {"additional_special_tokens": [token("<extra>")]}),
    "a flag of text": (CONFIG, {"added_tokens_decoder": {"340": {**token("<more>"), "lstrip": "no"}}}),
    "code of its own": (CONFIG, {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Slow", "mine.Fast"]}}),
}


@pytest.mark.parametrize("name", [*DAMAGED, *REFUSED])
def test_a_damaged_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    file, content = {**DAMAGED, **REFUSED}[name]
    write("tokenizer.json alone", tmp_path)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=file.replace(".", r"\.")) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_sentencepiece_model_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_tokenizer, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match="pip install sentencepiece"):
        Tokenizer.from_folder(tmp_path)


def test_a_token_outside_of_the_embedding_is_refused_where_it_is_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write("added_tokens.json alone", tmp_path))
    assert tokenizer is not None
    assert encode_prompt("Hello<|im_end|>", tokenizer, 341)[-1] == 340
    with pytest.raises(UserError, match=r"token id 341 \('<more>'\) is outside of the vocabulary"):
        encode_prompt("Hello<more>", tokenizer, 341)
