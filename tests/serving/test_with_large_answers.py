"""Answers with many log-probabilities are made beside the event loop, and little by little."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from common.serving import formats
from common.serving.formats import LIGHT, PART, as_json
from common.serving.token_texts import TokenTexts
from tests.serving.running import TINY, Running

Serve = Callable[..., Running]
PROMPT = [token % 250 for token in range(300)]
ECHO: dict[str, Any] = {"model": TINY, "prompt": PROMPT, "logprobs": 20, "n": 8, "max_tokens": 3, "echo": True}
LONG = ECHO | {"echo": False, "max_tokens": 80, "ignore_eos": True}
CHAT = {"model": TINY, "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20, "n": 8,
        "max_tokens": 80, "ignore_eos": True}  # fmt: skip
EACH = 23  # texts of a token with 20 alternatives, at most
MANY = [pytest.param("completions", ECHO, 300 + 8 * 3, id="echo"), pytest.param("completions", LONG, 640, id="long"),
        pytest.param("completions", ECHO | {"prompt": [PROMPT, PROMPT], "n": 4}, 624, id="two prompts"),
        pytest.param("chat/completions", CHAT, 640, id="chat")]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "tokens"), MANY)
def test_the_event_loop_writes_little_of_them_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], tokens: int, stream: bool
) -> None:
    """It took 5 s for the echo of 1,000 tokens in 16 answers, in which nobody else heard anything."""
    running = serve()
    read, events = running.service.token_texts.read, formats.Format.events
    reads, on_the_loop = Counter[bool](), [0]

    def counting_read(token_id: int) -> tuple[str, list[int]]:
        on_loop = threading.get_ident() == running._thread.ident
        reads[on_loop] += 1
        on_the_loop[-1] += on_loop
        return read(token_id)

    def counting_events(*given: Any) -> bytes:
        on_the_loop.append(0)
        return events(*given)

    monkeypatch.setattr(running.service.token_texts, "read", counting_read)
    monkeypatch.setattr(formats.Format, "events", counting_events)
    assert running.post(f"/v1/{path}", body | {"stream": stream}).status_code == 200
    assert 20 * tokens < reads.total() <= EACH * tokens, "a prompt counts once, not for each of its answers"
    assert max(on_the_loop) <= LIGHT and (stream or reads[True] == 0)


def test_the_library_is_asked_once_for_a_token(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[int]()
    ask = TokenTexts._read
    monkeypatch.setattr(TokenTexts, "_read", lambda self, token: (asked.update([token]), ask(self, token))[1])
    running = serve()
    for path, body in (("completions", ECHO), ("completions", LONG), ("chat/completions", CHAT)):
        assert running.post(f"/v1/{path}", body).status_code == 200
    assert len(asked) > 200 and set(asked.values()) == {1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "tokens"), MANY)
def test_the_library_writes_little_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], tokens: int, stream: bool
) -> None:
    """It writes JSON without letting another thread run."""
    written: list[int] = []

    def write(value: Any, compact: Callable[[Any], str] = formats.compact) -> str:
        text = compact(value)
        written.append(len(text))
        return text

    monkeypatch.setattr(formats, "compact", write)
    answer = serve().post(f"/v1/{path}", body | {"stream": stream})
    assert len(answer.text) > 300 * tokens
    assert 0 < max(written) < PART * 2000 and (stream or sum(written) > len(answer.text) / 2)


def test_tokens_of_a_long_text_are_listed_beside_the_event_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    threads = set[int | None]()
    monkeypatch.setattr(
        formats, "compact", lambda v, real=formats.compact: (threads.add(threading.get_ident()), real(v))[1]
    )
    answer = running.post("/tokenize", {"prompt": "a" * 400, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) and len(answer["token_strs"]) >= 400
    assert threads and running._thread.ident not in threads


@pytest.mark.parametrize("count", [0, 1, PART - 1, PART, PART + 1, 3 * PART])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_json_in_parts_is_json(count: int, depth: int) -> None:
    rows: list[Any] = [None, *({"ß\n": -1.5, "b": [1, {}]} for _ in range(count))]
    value = {"choices": [{"logprobs": {"rows": rows, "none": []}, "text": '"', "end": None}] * 3, "usage": {}, "n": 1.0}
    assert json.loads(as_json(value, depth)) == value and as_json(value, depth) == formats.compact(value)
