"""The answers, field by field, as OpenAI's reference has them: whole, and in pieces for a stream."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from common.engine import Engine
from common.serving.answer import Answer
from common.serving.engine_thread import Delta, Job
from common.serving.schema import CompletionRequest, Sampling, StreamOptions
from common.serving.tools import Piece, ToolParser
from common.text.detokenizer import Detokenizer

Json = dict[str, Any]


def as_event(piece: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(piece, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Format(ABC):
    """The answers of an endpoint.

    top: how many of the likeliest tokens are listed with each token, where log-probabilities were asked for.
    new_parser: makes a parser of calls for each answer to a chat.
    """

    id_prefix: str
    kind: str
    piece_kind: str

    def __init__(
        self, id: str, model: str, engine: Engine, body: Sampling, answer: Answer, top: int,
        new_parser: Callable[[], ToolParser] | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._answer, self._top, self._new_parser = engine.tokenizer, answer, top, new_parser
        self._echo = isinstance(body, CompletionRequest) and bool(body.echo)
        self._options = body.stream_options or StreamOptions()
        self._so_far: dict[int, int] = {}  # tokens of each answer
        self._parsers: dict[int, ToolParser | None] = {}  # of each answer that has begun
        self._prompts: dict[int, str] = {}  # the same, where they are echoed
        self._fields = {
            "id": f"{self.id_prefix}-{id}", "created": int(time.time()), "model": model,
            "system_fingerprint": f"folovllm-{engine.stage}",
        }  # fmt: skip

    def whole(self, choices: Sequence[Delta]) -> Json:
        """`choices`: for each answer everything that it gained, as one delta."""
        fields = {**self._fields, "object": self.kind}
        return {**fields, "choices": [self._choice(c) for c in choices], "usage": self._answer.usage()}

    def pieces(self, delta: Delta) -> Iterator[Json]:
        """What a stream sends when an answer gains something."""
        self._so_far[delta.index] = delta.num_generated
        yield from self._pieces(delta)

    def _pieces(self, delta: Delta) -> Iterator[Json]:
        yield self._piece(self._choice(delta))

    def last_pieces(self) -> Iterator[Json]:
        """With `stream_options: {"include_usage": true}`; other pieces have null, or the usage so far."""
        if self._options.include_usage:
            yield {**self._fields, "object": self.piece_kind, "choices": [], "usage": self._answer.usage()}

    def _piece(self, choice: Json) -> Json:
        usage = self._answer.usage(sum(self._so_far.values())) if self._options.continuous_usage_stats else None
        more = {"usage": usage} if self._options.include_usage else {}
        return {**self._fields, "object": self.piece_kind, "choices": [choice], **more}

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

    def _pieces(self, delta: Delta) -> Iterator[Json]:
        """First the role, then text and calls, then the reason for the end."""
        if delta.index not in self._parsers:
            yield self._chunk(delta.index, {"role": "assistant", "content": ""})
        logprobs = self._logprobs(delta)
        for part in list(self._parse(delta)) or ([""] if delta.logprobs else []):
            gained: Json = {"content": part} if isinstance(part, str) else {"tool_calls": [part]}
            yield self._chunk(delta.index, gained, logprobs)
            logprobs = None if logprobs is None else {"content": [], "refusal": None}
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=self._reason(delta))

    def _parse(self, delta: Delta) -> Iterator[Piece]:
        """The text of a delta, as content and calls."""
        if delta.index not in self._parsers:
            self._parsers[delta.index] = None if self._new_parser is None else self._new_parser()
        parser = self._parsers[delta.index]
        if parser is not None:
            yield from parser.feed(delta.text, end=delta.finish_reason is not None)
        elif delta.text:
            yield delta.text

    def _reason(self, delta: Delta) -> str | None:
        parser = self._parsers[delta.index]
        return parser.reason if parser and delta.finish_reason == "stop" else delta.finish_reason

    def _choice(self, delta: Delta) -> Json:
        parts = list(self._parse(delta))
        content, calls = "".join(part for part in parts if isinstance(part, str)), list[Json]()
        for part in parts:
            if isinstance(part, dict) and "id" in part:
                calls.append({key: value for key, value in part.items() if key != "index"})
            elif isinstance(part, dict):
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        return {
            "index": delta.index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": self._logprobs(delta),
            "finish_reason": self._reason(delta),
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
        alone = text.encode() if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode() if alone is None else alone)}


class TextFormat(Format):
    """/v1/completions."""

    id_prefix, kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, delta: Delta) -> Json:
        text, logprobs = delta.text, None
        if delta.logprobs is not None:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs, delta.offsets or [])
        if self._echo:
            text, logprobs = self._with_prompt(delta, logprobs)
        return {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _with_prompt(self, delta: Delta, logprobs: Json | None) -> tuple[str, Json | None]:
        """The prompt in front of the beginning of an answer; and where the text of each token lies behind it."""
        text, begins = delta.text, delta.index not in self._prompts
        if begins:
            self._prompts[delta.index] = self._prompt(self._answer.job(delta.index))
            text = self._prompts[delta.index] + text
        prompt = self._prompts[delta.index]
        if logprobs is not None:
            logprobs["text_offset"] = [len(prompt) + offset for offset in logprobs["text_offset"]]
            if begins and delta.prompt_logprobs is not None:
                token_ids = self._answer.job(delta.index).prompt
                offsets = self._offsets(self._answer.job(delta.index), len(prompt))
                first = self._logprobs(token_ids, delta.prompt_logprobs, offsets)
                logprobs = {name: first[name] + values for name, values in logprobs.items()}
        return text, logprobs

    def _prompt(self, job: Job) -> str:
        """As it was given; of token ids their text."""
        if self._tokenizer is None:
            return "".join(map(self._text, job.prompt))
        return self._tokenizer.decode(job.prompt) if job.text is None else job.text

    def _offsets(self, job: Job, most: int) -> list[int]:
        if self._tokenizer is None:
            return [0, *accumulate(len(self._text(token)) for token in job.prompt[:-1])]
        if job.text is not None:
            return self._tokenizer.offsets(job.text)
        return Detokenizer(self._tokenizer.backend, 0).offsets(job.prompt, len(job.prompt), most)

    def _logprobs(self, token_ids: list[int], logprobs: Sequence[dict[int, float] | None], offsets: list[int]) -> Json:
        """Of a prompt's first token there are none."""
        pairs = list(zip(token_ids, logprobs, strict=True))
        return {
            "tokens": [self._text(token) for token in token_ids],
            "token_logprobs": [values and values[token] for token, values in pairs],
            "top_logprobs": [values and self._alternatives(token, values) for token, values in pairs],
            "text_offset": offsets,
        }

    def _alternatives(self, sampled: int, values: dict[int, float]) -> Json:
        """The likeliest tokens and the sampled one, by text. A text that is the sampled one's, or a likelier one's, as
        parts of characters share one, gives way to `token_id:5`."""
        found: Json = {self._text(sampled): values[sampled]}
        for token, value in self._likeliest(values):
            text = self._text(token)
            if token != sampled:
                found[f"token_id:{token}" if text in found else text] = value
        return dict(sorted(found.items(), key=lambda item: -item[1]))
