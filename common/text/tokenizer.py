"""Text to token ids and back, and the model's own chat template.

Built on the `tokenizers` library alone: importing transformers for the same files would slow down every start.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as FastTokenizer

from common.errors import UserError, one_line
from common.text.chat_template import read_template, render
from common.text.json_file import read_json, write_json

LARGEST_CONFIG = 16 << 20
"""Bytes of tokenizer_config.json: models of speech list 65,000 tokens in 12 MB."""


class Tokenizer:
    """`backend` is the fast tokenizer itself; special_tokens ({"bos_token": "<s>", ...}) is for the chat template."""

    def __init__(
        self,
        backend: FastTokenizer,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path, eos_token_ids: Sequence[int] = ()) -> Self | None:
        """From a Hugging Face folder; None where it has no tokenizer files."""
        backend = _read_backend(folder)
        if backend is None:
            return None
        options = read_json(folder / "tokenizer_config.json", missing={}, largest=LARGEST_CONFIG)
        special = {
            key: text for key, value in options.items() if key.endswith("_token") and (text := _token_text(value))
        }
        return cls(backend, eos_token_ids, read_template(folder, options), special)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `from_folder` reads them."""
        self.backend.save(str(folder / "tokenizer.json"))
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", options)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens (such as a BOS) that the model expects around a prompt."""
        return self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins."""
        return self._encode(self.render(messages), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As a batch of one: the library's `encode` would block all other threads, such as an engine's."""
        try:
            text.encode()
        except UnicodeEncodeError:  # undecodable bytes of standard input become lone surrogates
            raise UserError("the text is not valid Unicode (a lone surrogate): pass it as UTF-8") from None
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as text in the model's own format."""
        if self.chat_template is None:
            raise UserError("this model has no chat template: give the prompt as plain text")
        return render(self.chat_template, messages, self.special_tokens)


def _read_backend(folder: Path) -> FastTokenizer | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} cannot be read: {one_line(error)}. Download it again") from error
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.model").is_file():
        return _convert_slow(folder)
    return None


def _convert_slow(folder: Path) -> FastTokenizer:
    """Older folders lack tokenizer.json: transformers builds the fast tokenizer from their other files."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return FastTokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # of whatever kind
        reason = one_line(error)[:200]
        raise UserError(f"{folder} has no tokenizer.json, and converting its tokenizer failed: {reason}") from error


def _token_text(value: object) -> str | None:
    """A special token is stored as its text, or as an object that has it under 'content'."""
    if isinstance(value, Mapping):
        value = value.get("content")  # pyright: ignore[reportUnknownVariableType,reportUnknownMemberType]
    return value if isinstance(value, str) else None
