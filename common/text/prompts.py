"""The three forms of a prompt, and the checks of each."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError, plain, require
from common.text.chat_template import template_kwargs
from common.text.tokenizer import ChatPrompt, Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # chat: `[{"role": "user", "content": "Hello"}]`


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids, of a chat as a `ChatPrompt`; `UserError` if empty, malformed, or outside of the vocabulary."""
    prompt = plain(prompt)
    wrong = f"not {type(prompt).__name__}: to generate from one prompt, pass [prompt]"
    known = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
    require(known, f"a prompt is text, a list of token ids, or a list of chat messages, {wrong}")
    require(len(prompt) > 0, "the prompt is empty: give text, token ids or chat messages")
    if isinstance(prompt, str) or all(isinstance(message, Mapping) for message in prompt):
        if tokenizer is None:
            raise UserError("this model has no tokenizer: give token ids, or add tokenizer.json to its folder")
        messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
        variables = template_kwargs(chat_template_kwargs)
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(messages, variables, tools)
    else:
        numbers: Sequence[Any] = prompt if set(map(type, prompt)) == {int} else [plain(number) for number in prompt]
        token_ids: list[int] = ChatPrompt(numbers) if isinstance(prompt, ChatPrompt) else list(numbers)
        require(set(map(type, token_ids)) == {int}, "a prompt of token ids holds whole numbers only")
    require(len(token_ids) > 0, "the prompt has no tokens: give text, token ids or chat messages")
    worst = max(token_ids) if min(token_ids) >= 0 else min(token_ids)
    text = tokenizer and 0 <= worst < 1 << 32 and tokenizer.backend.id_to_token(worst)
    name = f"token id {worst}" + (f" ({text!r})" if text else "")
    require(0 <= worst < vocab_size, f"{name} is outside of the vocabulary (0 ... {vocab_size - 1})")
    return token_ids
