"""Structured output through the real `openai` client; the model is random, so only the structure makes it fit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from common.sampling.structure import Structure
from common.serving import parameters
from tests.serving.running import TINY, Running, error_of, wait_until
from tests.serving.test_with_enforced_tools import USER, structured

pytest.importorskip("llguidance")
Serve = Callable[..., Running]


class Person(BaseModel):
    name: str = Field(max_length=4)
    kind: Literal["a", "ü"]
    children: list[bool] = Field(max_length=2)


ASK: dict[str, Any] = {"model": TINY, "messages": [USER], "max_tokens": 300}
HARD = {"type": "integer", "multipleOf": 999_983}


def test_the_clients_parse_gets_objects(serve: Serve) -> None:
    client = structured(serve, stage="m6").client.chat.completions
    for answer in client.parse(**ASK, response_format=Person, n=3, seed=2, logprobs=True, top_logprobs=2).choices:
        assert isinstance(answer.message.parsed, Person) and answer.finish_reason == "stop"
        assert answer.logprobs is not None and len(answer.logprobs.content or ()) > 10
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in answer.logprobs.content or ())
    with client.stream(**ASK, response_format=Person, seed=3) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)
    [answer] = client.create(**ASK, response_format={"type": "json_object"}, seed=1).choices
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content or ""), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{2}\\d{2,3}"}}, r"[a-c]{2}\d{2,3}"),
        ({"structured_outputs": {"choice": ["a.b", "ü+"]}}, r"a\.b|ü\+"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] "y"'}}, "x[0-9]y"),
        ({"structured_outputs": {"json": {"enum": [1, "b"]}}}, '1|"b"'),
        ({"guided_json": '{"enum": [1, "b"]}'}, '1|"b"'),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{2,}", "min_tokens": 5, "ignore_eos": True, "max_tokens": 8}, "[0-9]{5,}"),
    ],
    ids=str,
)
def test_completions_and_chats_fit(serve: Serve, extra: dict[str, Any], pattern: str) -> None:
    client = structured(serve).client
    options: dict[str, Any] = {"max_tokens": 40, "n": 3, "seed": 4, "extra_body": dict(extra)}
    for answer in client.completions.create(model=TINY, prompt=["a", "b"], logprobs=1, **options).choices:
        assert re.fullmatch(pattern, answer.text)
    for answer in client.chat.completions.create(**ASK | options).choices:
        assert re.fullmatch(pattern, answer.message.content or "")


def test_who_leaves_is_aborted(serve: Serve) -> None:
    running = structured(serve, stage="m6", engine={"swap_space": 10**6})
    endless = {"model": TINY, "prompt": "x", "max_tokens": 400, "guided_regex": "[a-z]{400}", "stream": True, "n": 2}
    with running.visit(endless):
        wait_until(lambda: len(running.engine.scheduler.running) == 2)
    running.wait_until_idle()
    again = running.client.completions.create(model=TINY, prompt="x", extra_body={"guided_regex": "[0-9]{5}"})
    assert re.fullmatch("[0-9]{5}", again.choices[0].text)


def test_a_slow_schema_delays_nobody_else(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused when its budget is over, as are those behind it; others, and structures that are known, go on."""
    running, compiled = structured(serve, encode_timeout=0.5), parameters.compiled

    def slow(engine: Any, param: str, given: Any, known: bool = False) -> object | None:
        if not known and "slow" in str(given):
            time.sleep(3)
        return compiled(engine, param, given, known)

    known = {"model": TINY, "prompt": "x", "max_tokens": 9, "guided_regex": "[0-9]{5}"}
    assert running.post("/v1/completions", known).status_code == 200
    monkeypatch.setattr(parameters, "compiled", slow)
    for slow_one in ("slow", "slower"):
        error = error_of(running.post("/v1/completions", known | {"guided_regex": slow_one}), 503)
        assert error["code"] == "encoding_timeout"
    began = time.monotonic()
    assert running.post("/v1/completions", known).status_code == 200
    assert running.post("/v1/completions", {"model": TINY, "prompt": "x", "max_tokens": 3}).status_code == 200
    assert time.monotonic() - began < 2, "the slow ones still have their threads"
    assert error_of(running.post("/v1/completions", known | {"guided_regex": "new"}), 503)["code"] == "encoding_timeout"


def test_what_is_too_hard_is_refused_and_the_server_goes_on(serve: Serve) -> None:
    running = structured(serve)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": HARD}}
    error = error_of(running.post("/v1/chat/completions", ASK | {"response_format": form}), 400)
    assert error["param"] == "response_format" and "too long" in error["message"]
    assert running.client.chat.completions.create(**ASK | {"max_tokens": 3}).choices


def test_a_server_without_the_library_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = structured(serve)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    error = error_of(running.post("/v1/chat/completions", ASK | {"response_format": {"type": "json_object"}}), 400)
    assert "pip install '.[structured]'" in error["message"] and error["param"] == "response_format"


def test_what_asks_for_nothing_is_nothing_and_zero_is_a_value(serve: Serve) -> None:
    running, body = structured(serve), {"model": TINY, "prompt": "x", "max_tokens": 4}
    for nothing in ({}, {"regex": None}, {"whitespace_pattern": None, "disable_any_whitespace": False}):
        assert running.post("/v1/completions", body | {"structured_outputs": nothing}).status_code == 200
    for wrong in ({"json": 0}, {"regex": 0}, {"regex": "a", "disable_any_whitespace": True}, {"backend": "xgrammar"}):
        error = error_of(running.post("/v1/completions", body | {"structured_outputs": wrong}), 400)
        assert error["param"] == "structured_outputs", error


def test_one_that_turns_out_too_hard_is_not_the_servers_fault(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running, advance = structured(serve), Structure.advance

    def fails(structure: Structure, token_id: int) -> None:
        advance(structure, token_id)
        structure.failed = "Too many items\n" if structure._tokens_due < -2 else None

    monkeypatch.setattr(Structure, "advance", fails)
    body = {"model": TINY, "prompt": "x", "max_tokens": 100, "seed": 1, "guided_regex": "[a-z]{9}"}
    error = error_of(running.post("/v1/completions", body), 400)
    assert (error["code"], error["type"]) == ("structure_failed", "invalid_request_error")
    assert "Too many items" in error["message"]
    events = running.post("/v1/completions", body | {"stream": True}).text
    assert "structure_failed" in events and "[DONE]" not in events
    running.wait_until_idle()
