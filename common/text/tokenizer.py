"""Text to token ids and back, by the `tokenizers` library, and the model's own chat template."""

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as FastTokenizer

from common.errors import UserError, refusing
from common.text.chat_template import Templates, choose, pick, read_template, render
from common.text.control_tokens import BRACKETS, ControlTokens, Touched
from common.text.hf_tokenizer import ADDED, NAMES, OPTIONS, read_backend
from common.text.json_file import read_json, write_json
from common.text.turn_ends import TURN_ENDS

ANSWER = "7315082946"  # the same in capitals
PROBES = [("user", "assistant", "user"), ("user", "assistant"), ("system", "user", "assistant", "user"), ("assistant",)]
PROBING = 0.5  # seconds
LARGEST = 16 << 20  # Bytes of a file: models of speech list 65,000 tokens in 12 MB

_OWN = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that a byte-level vocabulary writes as themselves
BYTES = {chr(byte): byte for byte in _OWN} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _OWN)
}


class ChatPrompt(list[int]):
    """A conversation. Its answer also ends at the `Tokenizer.turn_end_token_ids`, which a model's files often omit."""


class Tokenizer:
    """`backend` is the fast tokenizer itself; special_tokens ({"bos_token": "<s>", ...}) is for the chat template."""

    def __init__(
        self, backend: FastTokenizer, eos_token_ids: Sequence[int] = (), chat_template: Templates | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.backend = backend
        self.chat_template = chat_template
        self.template_kwargs: Mapping[str, Any] = {}  # variables for every chat
        self.special_tokens = dict(special_tokens or {})
        own = backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_token_ids, *([] if own is None else [own])]))
        self._control: dict[tuple[str, ...], ControlTokens] = {}  # by template, and what it may write
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path, eos_token_ids: Sequence[int] = ()) -> Self | None:
        """From a Hugging Face folder; None where it has no tokenizer files."""
        files = {name: read_json(folder / name, {}, LARGEST) for name in (OPTIONS, NAMES, ADDED)}
        templates = read_template(folder, files[OPTIONS])  # before transformers reads it, which would not name it
        read = read_backend(folder, files, read_json(folder / "config.json", missing={}))
        if read is None:
            return None
        backend, special = read
        return cls(backend, eos_token_ids, templates, special)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `from_folder` reads them."""
        with refusing("the model's tokenizer"):
            self.backend.save(str(folder / "tokenizer.json"))
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if isinstance(self.chat_template, Mapping):
            options["chat_template"] = [{"name": n, "template": text} for n, text in self.chat_template.items()]
        elif self.chat_template is not None:
            options["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", options)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens`: those (such as a BOS) that the model expects around a prompt."""
        # As a batch of one: the library's `encode` would block all other threads, such as an engine's.
        return self.backend.encode_batch_fast([_valid(text)], add_special_tokens=add_special_tokens)[0].ids

    def offsets(self, text: str) -> list[int]:
        """Where in the text each token of `encode` begins, in characters; for part of one, where the character does.
        What stands between two tokens belongs to the second; a token that the text has not has no width."""
        result, end = list[int](), 0
        for first, last in self.backend.encode_batch([text])[0].offsets:
            result.append(min(first, end) if last > first else end)
            end = max(end, last)
        return result

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Of a token that knows them: in a byte-level vocabulary, and `<0x0A>`. None for others, which are texts."""
        piece: str = self.backend.id_to_token(token_id) or ""
        byte_level, byte_fallback = (name in self._decoder for name in (b"ByteLevel", b"ByteFallback"))
        if byte_level and piece not in self.special_ids and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
        found = re.fullmatch("<0x([0-9A-F]{2})>", piece) if byte_fallback else None
        return None if found is None else bytes.fromhex(found[1])

    @functools.cached_property
    def _decoder(self) -> bytes:
        return self.backend.decoder.__getstate__() if self.backend.decoder else b""  # pyright: ignore

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> ChatPrompt:
        """Token ids of a conversation, up to where the assistant's answer begins.

        A control token that messages, tools or variables spell is encoded as text (`control_tokens`); without one,
        the rendered text is encoded as it is.
        """
        text = _valid(self.render(messages, template_kwargs, tools=tools))
        control = self._control_tokens(pick(self.chat_template, tools))
        marks = control.marks((messages, template_kwargs, tools))
        if marks is None:
            return ChatPrompt(control.encode(text))

        def marked(strict: bool) -> tuple[str, Touched]:
            chat, kwargs, functions = (control.mark(v, marks, strict) for v in (messages, template_kwargs, tools))
            return control.unmark(self.render(chat, kwargs, tools=functions), marks)

        same, touched = marked(strict=True)
        if same != text:  # the template looks for what is marked
            same, touched = marked(strict=False)
        return ChatPrompt(control.encode(same, touched))

    def _control_tokens(self, template: str) -> ControlTokens:
        variables: list[Any] = [*self.special_tokens.values(), *self.template_kwargs.values()]
        key = (template, *(value for value in variables if isinstance(value, str)))
        if key not in self._control:
            self._control[key] = ControlTokens(self.backend, template, key[1:])
        return self._control[key]

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens, which `decode` leaves out, by text."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @functools.cached_property
    def turn_end_token_ids(self) -> frozenset[int]:
        """Control tokens that are known to end a turn, and the one that this chat template writes behind an answer.
        Its first conversation that renders with the answer in it tells: some templates want other ones, or parts."""
        added = {token.content: token_id for token_id, token in self.backend.get_added_tokens_decoder().items()}
        ends = {added[text] for text in TURN_ENDS & added.keys()}
        bracketed = {text for text in added if len(text) > 2 and f"{text[0]}{text[-1]}" in BRACKETS}
        until = time.thread_time() + PROBING
        for roles, parts in itertools.product(PROBES, (False, True)):
            chat = ""
            with contextlib.suppress(UserError):
                texts = [ANSWER if role == "assistant" else "5 + 7?" for role in roles]
                contents = [[{"type": "text", "text": text}] if parts else text for text in texts]
                chat = self.render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
            _, found, behind = chat.rpartition(ANSWER)
            if found or time.thread_time() > until:
                behind = behind.lstrip(" \t\r\n\"'}])") if found else ""
                controls = [text for text in bracketed | self.special_ids.keys() if text and behind.startswith(text)]
                text = max(controls, key=len, default=None)
                if text is not None and text != self.special_tokens.get("bos_token"):
                    ends.add(added[text])
                break
        if "<|return|>" in added:  # in gpt-oss's format <|end|> ends one message of several
            ends.discard(added.get("<|end|>", -1))
        return frozenset(ends)

    def render(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any] | None = None, *,
        tools: Sequence[Any] | None = None, documents: Sequence[Any] | None = None,
    ) -> str:  # fmt: skip
        """The conversation as text in the model's own format. template_kwargs: variables that its template knows."""
        variables = {**self.special_tokens, **self.template_kwargs, **(template_kwargs or {})}
        return render(self.chat_template, messages, variables, tools, documents)

    def use_template(self, chosen: str | None, template_kwargs: Mapping[str, Any]) -> None:
        """chosen: one of the model's templates by name, or a file; `UserError` if it does not compile."""
        self.chat_template, self.template_kwargs = choose(self.chat_template, chosen), template_kwargs


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # undecodable bytes of standard input become lone surrogates
        raise UserError("the text is not valid Unicode (a lone surrogate): pass it as UTF-8") from None
    return text
