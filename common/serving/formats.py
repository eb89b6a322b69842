"""The answers, field by field, as OpenAI's reference has them: whole, and in pieces for a stream."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from common.serving.engine_thread import Delta
from common.text.tokenizer import Tokenizer

Json = dict[str, Any]


def as_event(piece: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(piece, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Format(ABC):
    """The answers of an endpoint.

    include_usage: pieces have a `usage` too, null in all but the last. top: how many of the likeliest tokens are listed
    with each token, where log-probabilities were asked for.
    """

    id_prefix: str
    kind: str
    piece_kind: str

    def __init__(
        self, id: str, model: str, stage: str, tokenizer: Tokenizer | None, include_usage: bool, top: int
    ) -> None:
        self.include_usage, self._tokenizer, self._top = include_usage, tokenizer, top
        self._offsets: dict[int, int] = {}  # where the next token of each begun answer starts, in characters
        self._fields = {
            "id": f"{self.id_prefix}-{id}", "created": int(time.time()), "model": model,
            "system_fingerprint": f"folovllm-{stage}",
        }  # fmt: skip

    def whole(self, choices: Sequence[Delta], usage: Json) -> Json:
        """`choices`: for each answer everything that it gained, as one delta."""
        return {**self._fields, "object": self.kind, "choices": [self._choice(c) for c in choices], "usage": usage}

    def pieces(self, delta: Delta) -> Iterator[Json]:
        """What a stream sends when an answer gains something."""
        yield self._piece(self._choice(delta))

    def usage_piece(self, usage: Json) -> Json:
        """The last piece, with `stream_options: {"include_usage": true}`."""
        return {**self._fields, "object": self.piece_kind, "choices": [], "usage": usage}

    def _piece(self, choice: Json) -> Json:
        empty = {"usage": None} if self.include_usage else {}
        return {**self._fields, "object": self.piece_kind, "choices": [choice], **empty}

    @abstractmethod
    def _choice(self, delta: Delta) -> Json: ...

    def _text(self, token_id: int) -> str:
        """One token as text; a token that is only part of a character becomes a replacement character."""
        if self._tokenizer is None:
            return f"{token_id} "
        decode = self._tokenizer.backend.decode
        alone = decode([token_id], skip_special_tokens=False)  # may lack the space before it
        return decode([token_id, token_id], skip_special_tokens=False).removeprefix(alone)

    def _likeliest(self, values: dict[int, float]) -> list[tuple[int, float]]:
        return sorted(values.items(), key=lambda item: -item[1])[: self._top]


class ChatFormat(Format):
    """/v1/chat/completions."""

    id_prefix, kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def pieces(self, delta: Delta) -> Iterator[Json]:
        """First the role, then text, then the reason for the end."""
        if delta.index not in self._offsets:
            self._offsets[delta.index] = 0
            yield self._chunk(delta.index, {"role": "assistant", "content": ""})
        if delta.text or delta.logprobs:
            yield self._chunk(delta.index, {"content": delta.text}, self._logprobs(delta))
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)

    def _choice(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _chunk(self, index: int, gained: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return self._piece({"index": index, "delta": gained, "logprobs": logprobs, "finish_reason": finish_reason})

    def _logprobs(self, delta: Delta) -> Json | None:
        if delta.logprobs is None:
            return None
        content: list[Json] = []
        for token, values in zip(delta.token_ids, delta.logprobs, strict=True):
            likeliest = [self._entry(other, value) for other, value in self._likeliest(values)]
            content.append({**self._entry(token, values[token]), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextFormat(Format):
    """/v1/completions."""

    id_prefix, kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> Json | None:
        if delta.logprobs is None:
            return None
        texts = [self._text(token) for token in delta.token_ids]
        start = self._offsets.get(delta.index, 0)
        *offsets, self._offsets[delta.index] = accumulate(map(len, texts), initial=start)
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [values[token] for token, values in pairs],
            "top_logprobs": [self._alternatives(token, values) for token, values in pairs],
            "text_offset": offsets,
        }

    def _alternatives(self, sampled: int, values: dict[int, float]) -> Json:
        """The likeliest tokens and the sampled one, by text. Of several with one text, the likeliest counts."""
        found: Json = {}
        for token, value in [*self._likeliest(values), (sampled, values[sampled])]:
            found.setdefault(self._text(token), value)
        return found
