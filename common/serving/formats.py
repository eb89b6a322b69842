"""The answers, field by field, as OpenAI's reference has them: whole, and in pieces for a stream."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

from common.serving.answer import Answer
from common.serving.engine_thread import Delta, Job
from common.serving.schema import CompletionRequest, Sampling, StreamOptions
from common.serving.service import Service
from common.serving.tools import Piece, ToolParser
from common.text.detokenizer import Detokenizer

Json = dict[str, Any]
VALUE = itemgetter(1)
PART = 64  # entries of a long list that are written at once
LIGHT = 500  # texts of tokens that the event loop writes itself: a few milliseconds
compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def as_json(value: Any, depth: int = 4) -> str:
    """Long lists in parts: while the library writes one, it keeps all other threads waiting. depth: of those lists."""
    if depth and isinstance(value, dict):
        fields: Json = value
        return "{" + ",".join(f"{compact(name)}:{as_json(item, depth - 1)}" for name, item in fields.items()) + "}"
    if not isinstance(value, list):
        return compact(value)
    items: list[Any] = value
    if depth:
        return "[" + ",".join(as_json(item, depth - 1) for item in items) + "]"
    return "[" + ",".join(compact(items[i : i + PART])[1:-1] for i in range(0, len(items), PART)) + "]"


def as_event(piece: Json, write: Callable[[Json], str] = compact) -> bytes:
    """A server-sent event."""
    return b"data: " + write(piece).encode() + b"\n\n"


class Format(ABC):
    """The answers of an endpoint.

    top: how many of the likeliest tokens are listed with each token, where log-probabilities were asked for.
    new_parser: makes a parser of calls for each answer to a chat.
    """

    id_prefix: str
    kind: str
    piece_kind: str

    def __init__(
        self, id: str, service: Service, body: Sampling, answer: Answer, top: int,
        new_parser: Callable[[], ToolParser] | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._texts = service.engine.tokenizer, service.token_texts
        self._answer, self._top, self._new_parser = answer, top, new_parser
        self._echo = isinstance(body, CompletionRequest) and bool(body.echo)
        self._options = body.stream_options or StreamOptions()
        self._so_far: dict[int, int] = {}  # tokens of each answer
        self._parsers: dict[int, ToolParser | None] = {}  # of each answer that has begun
        self._prompts: dict[Job, tuple[str, Json | None]] = {}  # where they are echoed, once for all samples
        self._begun: set[int] = set()  # answers that have had theirs
        self._fields = {
            "id": f"{self.id_prefix}-{id}", "created": int(time.time()), "model": service.model_name,
            "system_fingerprint": f"folovllm-{service.engine.stage}",
        }  # fmt: skip

    def work(self, deltas: Sequence[Delta]) -> int:
        """How many texts of single tokens it takes to write them, at most."""
        gained = [len(delta.logprobs or ()) for delta in deltas]
        if self._echo:
            gained += [len(self._answer.job(d.index).prompt) for d in deltas if d.index not in self._begun]
        return sum(gained) * (self._top + 3)

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """What a stream sends when answers gain something."""
        write = as_json if self.work(deltas) > LIGHT else compact
        return b"".join(as_event(piece, write) for delta in deltas for piece in self.pieces(delta))

    def whole(self, choices: Sequence[Delta]) -> Json:
        """`choices`: for each answer everything that it gained, as one delta."""
        fields = {**self._fields, "object": self.kind}
        return {**fields, "choices": [self._choice(c) for c in choices], "usage": self._answer.usage()}

    def pieces(self, delta: Delta) -> Iterator[Json]:
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
            listed = sorted(values.items(), key=VALUE, reverse=True)[: self._top]
            likeliest = [self._entry(other, value) for other, value in listed]
            content.append({**self._entry(token, values[token]), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        text, alone = self._texts.read(token_id)
        return {"token": text, "logprob": logprob, "bytes": alone}


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
        job, text = self._answer.job(delta.index), delta.text
        if job not in self._prompts:
            self._prompts[job] = self._prompt(job, delta)
        prompt, first = self._prompts[job]
        if logprobs is not None:
            logprobs["text_offset"] = [len(prompt) + offset for offset in logprobs["text_offset"]]
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            text = prompt + text
            if logprobs is not None and first is not None:
                logprobs = {name: first[name] + values for name, values in logprobs.items()}
        return text, logprobs

    def _prompt(self, job: Job, delta: Delta) -> tuple[str, Json | None]:
        """A prompt as it was given, or of token ids their text; and its log-probabilities."""
        if self._tokenizer is None:
            texts = [self._texts[token] for token in job.prompt]
            text, offsets = "".join(texts), [0, *accumulate(map(len, texts[:-1]))]
        else:
            text, offsets = self._tokenizer.decode(job.prompt) if job.text is None else job.text, None
        if delta.prompt_logprobs is None or delta.logprobs is None:
            return text, None
        if offsets is None and self._tokenizer is not None:
            count, detokenizer = len(job.prompt), Detokenizer(self._tokenizer.backend, 0)
            given = job.text is not None
            offsets = self._tokenizer.offsets(text) if given else detokenizer.offsets(job.prompt, count, len(text))
        return text, self._logprobs(job.prompt, delta.prompt_logprobs, offsets or [])

    def _logprobs(self, token_ids: list[int], logprobs: Sequence[dict[int, float] | None], offsets: list[int]) -> Json:
        """Of a prompt's first token there are none."""
        pairs = list(zip(token_ids, logprobs, strict=True))
        return {
            "tokens": [self._texts[token] for token in token_ids],
            "token_logprobs": [values and values[token] for token, values in pairs],
            "top_logprobs": [values and self._alternatives(token, values) for token, values in pairs],
            "text_offset": offsets,
        }

    def _alternatives(self, sampled: int, values: dict[int, float]) -> Json:
        """The likeliest tokens and the sampled one, by text. A text that is the sampled one's, or a likelier one's, as
        parts of characters share one, gives way to `token_id:5`."""
        own, found = self._texts[sampled], Json()
        for token, value in sorted(values.items(), key=VALUE, reverse=True):
            text = self._texts[token]
            taken = token != sampled and (text == own or text in found)
            found[f"token_id:{token}" if taken else text] = value
        return found
