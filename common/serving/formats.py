"""The answers, field by field, as OpenAI's reference has them: whole, and in pieces for a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from common.serving.answer import Usage
from common.serving.engine_thread import Delta
from common.text.tokenizer import Tokenizer

Json = dict[str, Any]


class Format(Protocol):
    """One of the two endpoints' ways to say the same."""

    def whole(self, choices: Sequence[Delta], usage: Usage) -> Json:
        """`choices`: for each answer everything that it gained, as one delta."""
        ...

    def pieces(self, delta: Delta) -> Iterator[Json]:
        """What a stream says when an answer gains something."""
        ...

    def usage_piece(self, usage: Usage) -> Json:
        """The last one, with `stream_options: {"include_usage": true}`."""
        ...


class _Head:
    """The fields around the choices. `include_usage`: pieces have a `usage` too, null in all but the last."""

    def __init__(
        self, id: str, model: str, stage: str, tokenizer: Tokenizer | None, include_usage: bool, kind: str, piece: str
    ) -> None:
        self._words = TokenText(tokenizer)
        self._include_usage = include_usage
        self._kinds = (kind, piece)
        self._fields = {
            "id": id, "created": int(time.time()), "model": model, "system_fingerprint": f"folovllm-{stage}",
        }  # fmt: skip

    def _whole(self, choices: Sequence[Json], usage: Usage) -> Json:
        return {**self._fields, "object": self._kinds[0], "choices": list(choices), "usage": _usage(usage)}

    def _piece(self, choice: Json) -> Json:
        empty = {"usage": None} if self._include_usage else {}
        return {**self._fields, "object": self._kinds[1], "choices": [choice], **empty}

    def usage_piece(self, usage: Usage) -> Json:
        return {**self._fields, "object": self._kinds[1], "choices": [], "usage": _usage(usage)}


class ChatFormat(_Head):
    """/v1/chat/completions."""

    def __init__(self, id: str, model: str, stage: str, tokenizer: Tokenizer | None, include_usage: bool, top: int):
        """`top`: so many likeliest tokens beside each token, where log-probabilities were asked for."""
        super().__init__(
            f"chatcmpl-{id}", model, stage, tokenizer, include_usage, "chat.completion", "chat.completion.chunk"
        )
        self._top = top
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[Delta], usage: Usage) -> Json:
        return self._whole(
            [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice),
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            usage,
        )

    def pieces(self, delta: Delta) -> Iterator[Json]:
        """First the role, then text, then the reason for the end."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(delta.index, {"role": "assistant", "content": ""})
        if delta.text or delta.logprobs:
            yield self._chunk(delta.index, {"content": delta.text}, self._logprobs(delta))
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)

    def _chunk(self, index: int, gained: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return self._piece({"index": index, "delta": gained, "logprobs": logprobs, "finish_reason": finish_reason})

    def _logprobs(self, delta: Delta) -> Json | None:
        if delta.logprobs is None:
            return None
        content = [
            {
                **self._words.entry(token, values[token]),
                "top_logprobs": [self._words.entry(other, value) for other, value in _likeliest(values, self._top)],
            }
            for token, values in zip(delta.token_ids, delta.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


class TextFormat(_Head):
    """/v1/completions."""

    def __init__(self, id: str, model: str, stage: str, tokenizer: Tokenizer | None, include_usage: bool, top: int):
        super().__init__(f"cmpl-{id}", model, stage, tokenizer, include_usage, "text_completion", "text_completion")
        self._top = top
        self._offsets: dict[int, int] = {}  # of each answer's next token, in characters

    def whole(self, choices: Sequence[Delta], usage: Usage) -> Json:
        return self._whole([self._choice(choice) for choice in choices], usage)

    def pieces(self, delta: Delta) -> Iterator[Json]:
        yield self._piece(self._choice(delta))

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
        texts = [self._words.text(token) for token in delta.token_ids]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offsets.get(delta.index, 0))
            self._offsets[delta.index] = offsets[-1] + len(text)
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
        return {
            "tokens": texts,
            "token_logprobs": [values[token] for token, values in pairs],
            "top_logprobs": [self._alternatives(token, values) for token, values in pairs],
            "text_offset": offsets,
        }

    def _alternatives(self, sampled: int, values: dict[int, float]) -> Json:
        """By text: the likeliest tokens, and the one that was sampled. Of those that are part of a character, and so
        have the same text, the likeliest one counts."""
        found: Json = {}
        for token, value in [*_likeliest(values, self._top), (sampled, values[sampled])]:
            found.setdefault(self._words.text(token), value)
        return found


class TokenText:
    """Single tokens as text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """A token that is part of a character only shows as a replacement character."""
        if self._tokenizer is None:
            return f"{token_id} "
        return self._tokenizer.backend.decode([token_id], skip_special_tokens=False)

    def entry(self, token_id: int, logprob: float) -> Json:
        text = self.text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _likeliest(values: dict[int, float], count: int) -> list[tuple[int, float]]:
    return sorted(values.items(), key=lambda item: -item[1])[:count]


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
