"""What goes over the wire, byte by byte where it matters: streams and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.running import TINY, Running, Steps, error_of

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}
IDS = PROMPT | {"prompt": [1, 2, 3]}
CHAT: dict[str, Any] = {"model": TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_server_sent_events_and_ends_with_done(running: Running) -> None:
    response = running.post("/v1/completions", PROMPT | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *events, done, nothing = response.content.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    pieces = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert {(p["id"], p["object"], p["model"]) for p in pieces} == {
        (f"cmpl-{response.headers['x-request-id']}", "text_completion", TINY)
    }
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [*[None] * (len(pieces) - 1), "length"]


def test_the_first_event_leaves_before_the_last_token_is_there(serve: Serve) -> None:
    running = serve(talks=False)
    steps = Steps(running.engine)
    with running.visit(IDS | {"stream": True}) as client:
        steps.allow(1)
        response = client.getresponse()
        assert response.readline().startswith(b"data: {")
        assert steps.begun <= 2
        steps.allow()
        assert response.read().count(b"data: ") == 4, "three tokens more, and [DONE]"


# -- errors ------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}


@pytest.mark.parametrize(
    ("path", "change", "param", "says"),
    [
        ("completions", {"foo": 1}, "foo", "Unknown parameter: 'foo'"),
        ("completions", {"prompt": None}, "prompt", "Invalid 'prompt'"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": "\ud800"}, "prompt", "prompt"),
        ("completions", {"prompt": [700]}, "prompt", "outside of the vocabulary"),
        ("completions", {"prompt": [2**40]}, "prompt", "outside of the vocabulary"),
        ("completions", {"max_tokens": "4"}, "max_tokens", "valid integer"),
        ("completions", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("completions", {"max_tokens": 600}, "prompt", "maximum context length is 512 tokens"),
        ("completions", {"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ("completions", {"n": 17}, "n", "16 at most"),
        ("completions", {"prompt": ["a", "\ud800"]}, "prompt", "unicode"),
        ("completions", {"prompt": [[1], [700]]}, "prompt", "outside of the vocabulary"),
        ("completions", {"prompt": [[1]] * 2049}, "prompt", "at most 2048 items"),
        ("completions", {"prompt": ["a"] * 2049}, "prompt", "at most 2048 items"),
        ("completions", {"prompt": [10**300]}, "prompt", "less than"),
        ("completions", {"max_tokens": 1e300}, "max_tokens", "valid integer"),
        ("completions", {"max_tokens": 10**300}, "max_tokens", "less than"),
        ("completions", {"min_tokens": 10**300}, "min_tokens", "less than"),
        ("completions", {"n": 10**300}, "n", "less than"),
        ("completions", {"stop_token_ids": [10**300]}, "stop_token_ids", "less than"),
        ("chat/completions", {"max_completion_tokens": 1e300}, "max_completion_tokens", "valid integer"),
        ("chat/completions", {"max_completion_tokens": 10**300}, "max_completion_tokens", "less than"),
        ("chat/completions", {"max_tokens": 600}, "messages", "maximum context length"),
        ("completions", {"logit_bias": {"700": 1}}, "logit_bias", "vocabulary of 512 has not"),
        ("completions", {"stop": "\ud800"}, "stop", "unicode"),
        ("completions", {"stop": "x" * 257}, "stop", "at most 256 characters"),
        ("completions", {"best_of": True}, "best_of", "not supported"),
        ("completions", {"store": 0}, "store", "not supported"),
        ("chat/completions", {"min_tokens": 9}, "min_tokens", "at most max_tokens (4)"),
        ("chat/completions", {"messages": [USER, USER | {"content": "\ud800"}]}, "messages[1].content", "surrogate"),
        (
            "chat/completions",
            {"messages": [USER | {"content": [{"type": "text", "text": "\udfff"}]}]},
            "messages[0].content",
            "surrogate",
        ),
        ("chat/completions", {"messages": [USER | {"name": "\ud800"}]}, "messages[0].name", "surrogate"),
        (
            "chat/completions",
            {"messages": [USER | {"reasoning_content": "\ud800"}]},
            "messages[0].reasoning_content",
            "surrogate",
        ),
        ("chat/completions", {"messages": [USER, CALLED]}, "messages[1].tool_calls", "surrogate"),
        (
            "chat/completions",
            {"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]},
            "tools",
            "surrogate",
        ),
        ("chat/completions", {"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs", "surrogate"),
        ("chat/completions", {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "must not hold"),
        ("completions", {"min_tokens": 9}, "min_tokens", "min_tokens must be at most max_tokens (4), not 9"),
        ("completions", {"stop": ["a"] * 65}, "stop", "at most 64"),
        ("completions", {"stop": ""}, "stop", "at least 1"),
        ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("chat/completions", {"echo": True}, "echo", "'echo' is not supported"),
        ("completions", {"best_of": 3}, "best_of", "'best_of' is not supported"),
        ("completions", {"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ("completions", {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown parameter"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'system'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "Missing required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "only parts of the form",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "Missing required",
        ),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools[0].function", "Missing required"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format", "needs a tokenizer"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
        ("chat/completions", {"max_completion_tokens": 600}, "messages", "maximum context length"),
    ],
)
def test_what_cannot_be_is_400_in_openais_form(
    running: Running, path: str, change: dict[str, Any], param: str | None, says: str
) -> None:
    body = (PROMPT if path == "completions" else CHAT) | change
    for stream in (False, True) if "stream_options" not in change else (change.get("stream", False),):
        sent = json.dumps(body | {"stream": stream})
        response = running.http.post(f"/v1/{path}", content=sent, headers={"Content-Type": "application/json"})
        error = error_of(response, 400)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert says in error["message"]
    running.wait_until_idle()


def test_fields_that_ask_for_nothing_special_are_taken(running: Running) -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
        "logit_bias": {}, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True,
        "seed": None, "stop": None, "n": None, "temperature": None, "stream": None, "prompt_cache_key": "k",
    }  # fmt: skip
    assert running.post("/v1/chat/completions", CHAT | neutral).status_code == 200
    legacy = {"echo": False, "suffix": "", "best_of": 1, "logprobs": None}
    assert running.post("/v1/completions", PROMPT | legacy).status_code == 200


def test_paths_methods_and_bodies_that_do_not_fit_are_refused(running: Running) -> None:
    assert error_of(running.get("/v1/nothing"), 404)["message"] == "Invalid URL (GET /v1/nothing)"
    response = running.get("/v1/completions")
    assert error_of(response, 405)["message"] == "Not allowed to GET /v1/completions"
    assert response.headers["allow"] == "POST"
    url = "/v1/completions"
    as_json = {"Content-Type": "application/json"}
    digits = b'{"top_k": ' + b"9" * 5000 + b"}"
    for unreadable in (b'{"model', b'{"model": "\xff"}', b"[" * 100_000, digits):
        error = error_of(running.http.post(url, content=unreadable, headers=as_json), 400)
        assert error["message"] == "We could not parse the JSON body of your request."
    assert "JSON object" in error_of(running.http.post(url, content=b"[1]", headers=as_json), 400)["message"]
    text = {"Content-Type": "text/plain"}  # what a page of another site could send without asking
    assert "Content-Type" in error_of(running.http.post(url, json=PROMPT, headers=text), 400)["message"]
    surrogate = error_of(running.http.post(url, content=json.dumps(PROMPT | {"\ud800": 1}), headers=as_json), 400)
    assert surrogate["message"] == "Unknown parameter: '?'."


def test_a_model_without_a_tokenizer_takes_token_ids_only(serve: Serve) -> None:
    running = serve(talks=False)
    assert "no tokenizer" in error_of(running.post("/v1/chat/completions", CHAT), 400)["message"]
    assert "no tokenizer" in error_of(running.post("/v1/completions", PROMPT), 400)["message"]
    stop = running.post("/v1/completions", PROMPT | {"prompt": [1], "stop": "x"})
    assert "stop_token_ids" in error_of(stop, 400)["message"]


@pytest.mark.parametrize("depth", [300, 700, 900])
def test_what_is_nested_too_deeply_is_400(running: Running, caplog: pytest.LogCaptureFixture, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    called = f'{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{deep}}}}}]}}'
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{deep}}}}}'
    for field in (f'"chat_template_kwargs":{deep}', f'"messages":[{called}]', f'"tools":[{tool}]', f'"user":{deep}',
                  f'"response_format":{{"type":"json_schema","json_schema":{{"schema":{deep}}}}}'):  # fmt: skip
        for path, body in (("/v1/chat/completions", CHAT), ("/tokenize", {"messages": [USER]})):
            content = json.dumps(body)[:-1] + f",{field}}}"
            response = running.http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), f"{field[:30]}: {response.text}"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
