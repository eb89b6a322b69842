"""The three forms of a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common import UserError
from common.text.prompts import encode_prompt
from common.text.tokenizer import ChatPrompt, Tokenizer


def test_text_token_ids_and_chat_all_become_token_ids(tokenizer: Tokenizer) -> None:
    assert encode_prompt("Hello there", tokenizer, tokenizer.vocab_size) == tokenizer.encode("Hello there")
    numbers: list[Any] = [
        (3, 0, 9),
        np.array([3, 0, 9]),
        [np.int64(3), np.uint8(0), torch.tensor(9)],
        torch.tensor([3, 0, 9]),
    ]
    for three in numbers:
        ids = encode_prompt(three, None, 10)
        assert ids == [3, 0, 9] and {type(i) for i in ids} == {int}
    messages = [{"role": "user", "content": "Hello"}]
    ids = encode_prompt(messages, tokenizer, tokenizer.vocab_size)
    assert ids == tokenizer.chat(messages)
    for chat in (ids, encode_prompt(ids, tokenizer, tokenizer.vocab_size)):
        assert isinstance(chat, ChatPrompt), "a server encodes before its engine does"
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert "<|im_start|>user\nHello<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [True, 1],
        [1.0],
        [1, "a"],
        ["a"],
        [-1],
        [10],
        [1, 2, 10],
        [None],
        5,
        None,
        b"bytes",
        {"role": "user", "content": "Hello"},
        np.array([1.0, 2.0]),
        np.array([[1], [2]]),
        np.array(5),
        np.array([True]),
        [{"role": "user", "content": "Hello"}, 3],
    ],
)
def test_a_malformed_prompt_is_refused_in_one_line(prompt: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as caught:
        encode_prompt(prompt, tokenizer, 10)
    assert "\n" not in str(caught.value)


def test_the_message_names_the_offending_token() -> None:
    with pytest.raises(UserError, match=r"-3 .*0 \.\.\. 9"):
        encode_prompt([1, -3, 400], None, 10)
    with pytest.raises(UserError, match="token id 400 "):
        encode_prompt([1, 400], None, 10)


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user"}], [{"role": "narrator", "content": "Hello"}], [{"role": "user", "content": 5}]],
)
def test_malformed_chat_messages_are_refused(messages: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError):
        encode_prompt(messages, tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("prompt", ["Hello", [{"role": "user", "content": "Hello"}]])
def test_text_without_a_tokenizer_says_what_is_missing(prompt: Any) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        encode_prompt(prompt, None, 10)
