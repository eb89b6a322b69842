"""What goes over the wire, byte by byte where it matters: streams, errors, limits, keys, metrics, the trace."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import UserError
from common.serving.gate import salt_of
from common.serving.options import ServerOptions
from common.serving.server import listen
from tests.serving.running import TINY, Running, slow_down, wait_until

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}
IDS = PROMPT | {"prompt": [1, 2, 3]}
CHAT: dict[str, Any] = {"model": TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve()


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


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
    steps = slow_down(running.engine, 0.05)
    seen: list[int] = []
    with httpx2.stream("POST", f"{running.url}/v1/completions", json=IDS | {"stream": True}) as response:
        for _ in response.iter_bytes():
            seen.append(steps[0])
    assert len(seen) == 5, "four tokens, and [DONE]"
    assert seen[0] <= 2


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "param", "says"),
    [
        ("completions", {"foo": 1}, "foo", "Unknown parameter: 'foo'"),
        ("completions", {"prompt": None}, "prompt", "Invalid 'prompt'"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": "\ud800"}, "prompt", "prompt"),
        ("completions", {"prompt": [700]}, None, "outside of the vocabulary"),
        ("completions", {"max_tokens": "4"}, "max_tokens", "valid integer"),
        ("completions", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("completions", {"max_tokens": 600}, None, "maximum context length is 512 tokens"),
        ("completions", {"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ("completions", {"n": 17}, "n", "16 at most"),
        ("completions", {"min_tokens": 9}, None, "min_tokens must be between 0 and max_tokens"),
        ("completions", {"stop": ["a"] * 5}, "stop", "at most 4"),
        ("completions", {"stop": ""}, "stop", "at least 1"),
        ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("completions", {"echo": True}, "echo", "'echo' is not supported"),
        ("completions", {"best_of": 3}, "best_of", "'best_of' is not supported"),
        ("completions", {"logit_bias": {"5": 1}}, "logit_bias", "'logit_bias' is not supported"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ("completions", {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown parameter"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages", "'system'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "Missing required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "Only parts of the form",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls",
            "not supported",
        ),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools", "'tools' is not supported"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
        ("chat/completions", {"max_completion_tokens": 600}, None, "maximum context length"),
    ],
)
def test_what_cannot_be_is_400_in_openais_form(
    running: Running, path: str, change: dict[str, Any], param: str | None, says: str
) -> None:
    body = (PROMPT if path == "completions" else CHAT) | change
    for stream in (False, True) if "stream_options" not in change else (change.get("stream", False),):
        sent = json.dumps(body | {"stream": stream})
        response = httpx2.post(f"{running.url}/v1/{path}", content=sent, headers={"Content-Type": "application/json"})
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


def test_paths_methods_and_bodies_that_do_not_fit(running: Running) -> None:
    assert error_of(running.get("/v1/nothing"), 404)["message"] == "Invalid URL (GET /v1/nothing)"
    response = running.get("/v1/completions")
    assert error_of(response, 405)["message"] == "Not allowed to GET /v1/completions"
    assert response.headers["allow"] == "POST"
    url = f"{running.url}/v1/completions"
    as_json = {"Content-Type": "application/json"}
    assert "could not parse" in error_of(httpx2.post(url, content=b'{"model', headers=as_json), 400)["message"]
    assert "JSON object" in error_of(httpx2.post(url, content=b"[1]", headers=as_json), 400)["message"]
    text = {"Content-Type": "text/plain"}  # what a page of another site could send without asking
    assert "Content-Type" in error_of(httpx2.post(url, json=PROMPT, headers=text), 400)["message"]
    assert error_of(httpx2.post(url, content=b"[" * 100_000, headers=as_json), 400)


def test_a_model_without_a_tokenizer_takes_token_ids_only(serve: Serve) -> None:
    running = serve(talks=False)
    assert "no tokenizer" in error_of(running.post("/v1/chat/completions", CHAT), 400)["message"]
    assert "no tokenizer" in error_of(running.post("/v1/completions", PROMPT), 400)["message"]
    stop = running.post("/v1/completions", PROMPT | {"prompt": [1], "stop": "x"})
    assert "stop_token_ids" in error_of(stop, 400)["message"]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_with_its_length_stated_or_not(serve: Serve) -> None:
    running = serve(max_body=1000)
    long = PROMPT | {"prompt": "x" * 2000}
    assert "over 1000 bytes" in error_of(running.post("/v1/completions", long), 413)["message"]

    def chunks() -> Iterator[bytes]:
        yield from (json.dumps(long).encode()[i : i + 100] for i in range(0, 2000, 100))

    headers = {"Content-Type": "application/json"}
    response = httpx2.post(f"{running.url}/v1/completions", content=chunks(), headers=headers)
    assert "over 1000 bytes" in error_of(response, 413)["message"]
    assert running.post("/v1/completions", PROMPT).status_code == 200


def test_limits_on_prompts_answers_and_tokens(serve: Serve) -> None:
    running = serve(max_prompt_tokens=10, max_n=2, max_tokens=6)
    too_long = error_of(running.post("/v1/completions", PROMPT | {"prompt": "x" * 11}), 400)
    assert "11 tokens; this server takes 10" in too_long["message"]
    assert error_of(running.post("/v1/completions", PROMPT | {"n": 3}), 400)["param"] == "n"
    assert error_of(running.post("/v1/completions", PROMPT | {"prompt": ["a", "b", "c"]}), 400)["param"] == "n"
    assert error_of(running.post("/v1/completions", PROMPT | {"max_tokens": 7}), 400)["param"] == "max_tokens"
    chat = CHAT | {"messages": [{"role": "user", "content": "x"}]}
    del chat["max_tokens"]
    assert running.post("/v1/chat/completions", chat).json()["usage"]["completion_tokens"] == 6


def test_a_full_queue_answers_429_and_takes_more_later(serve: Serve) -> None:
    running = serve(engine={"max_num_seqs": 1}, max_queue=2)
    slow_down(running.engine, 0.03)
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(running.post("/v1/completions", PROMPT))) for _ in "123"]
    for thread in threads:
        thread.start()
    wait_until(lambda: running.service.open_choices == 3)
    refused = running.post("/v1/completions", PROMPT)
    assert error_of(refused, 429)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert running.post("/v1/completions", PROMPT).status_code == 200
    assert error_of(running.post("/v1/completions", PROMPT | {"n": 4}), 400)["param"] == "n", "it would never fit"


@pytest.mark.parametrize(
    "options",
    [{"port": 70000}, {"api_keys": ("",)}, {"api_keys": ("ключ",)}, {"max_queue": -1}, {"max_body": 0}, {"max_n": 0},
     {"drain": -1.0}, {"spans": "paper"}, {"nonsense": 1}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ServerOptions(**options)


def test_a_port_in_use_and_an_address_that_is_not_ours_are_refused() -> None:
    with listen(ServerOptions(port=0)) as taken:
        taken.listen()
        with pytest.raises(UserError, match="Choose another --port"):
            listen(ServerOptions(port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="cannot listen"):
        listen(ServerOptions(host="192.0.2.1", port=0))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_without_a_key_only_health_is_open(serve: Serve) -> None:
    running = serve(api_keys=("secret-1", "secret-2"))
    for path in ("/v1/models", "/metrics", "/trace", "/openapi.json", "/v1/nothing"):
        assert error_of(running.get(path), 401)["code"] == "invalid_api_key"
    assert running.get("/health").status_code == 200
    wrong = running.post("/v1/completions", PROMPT, headers={"Authorization": "Bearer secret-3"})
    assert error_of(wrong, 401)["message"].startswith("Incorrect API key")
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert error_of(running.get("/v1/models", headers={"Authorization": "secret-1"}), 401)
    assert error_of(running.get("/v1/models", headers={"Authorization": "Basic secret-1"}), 401)
    for key in ("secret-1", "secret-2"):
        assert running.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_the_cache_salt_follows_the_key(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that takes one: it arrives, differs from key to key, and is not the key."""
    running = serve(api_keys=("a", "b"))
    salts: list[str | None] = []
    add = running.engine.add_request

    def add_request(prompt: Any, params: Any = None, *, cache_salt: str | None = None, **options: Any) -> str:
        salts.append(cache_salt)
        return add(prompt, params, **options)

    monkeypatch.setattr(running.engine, "add_request", add_request)
    monkeypatch.setattr(running.service.thread, "_takes_salt", True)
    for key in "aba":
        running.post("/v1/completions", PROMPT, headers={"Authorization": f"Bearer {key}"})
    assert salts == [salt_of(b"a"), salt_of(b"b"), salt_of(b"a")]
    assert len(set(salts)) == 2 and "a" not in salts


# -- what the server says about itself ---------------------------------------------------------------------------------


def metrics_of(running: Running) -> dict[str, float]:
    """Sample name and labels to value, by a parser of Prometheus' own."""
    response = running.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f",{value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_say_what_happened(running: Running) -> None:
    before = metrics_of(running)
    assert before["folovllm_requests_running"] == before["folovllm_generation_tokens_total"] == 0
    for _ in range(3):
        running.post("/v1/completions", PROMPT | {"n": 2})
    running.get("/v1/nothing")
    after = metrics_of(running)
    expected = {
        "prompt_tokens_total": 3 * 5,
        "generation_tokens_total": 3 * 2 * 4,
        "time_to_first_token_seconds_count": 3,
        "time_per_output_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 3 * 2 * 3,
        "queue_time_seconds_count": 3,
        "request_seconds_count": 3,
        "requests_total,ok": 3,
        "http_responses_total,/v1/completions,200": 3,
        "http_responses_total,other,404": 1,
        "requests_running": 0,
        "requests_waiting": 0,
        "requests_swapped": 0,
        "kv_usage_ratio": 0,
        "preemptions_total": 0,
        "info,m3": 1,
    }
    assert {name: after[f"folovllm_{name}"] for name in expected} == expected
    assert after["folovllm_steps_total"] == 12
    assert after["folovllm_kv_pool_bytes"] > 0
    assert 0 < after["folovllm_time_to_first_token_seconds_sum"] < after["folovllm_request_seconds_sum"]
    assert "folovllm_prefix_hit_rate" not in after, "no engine of these stages has one"


def test_metrics_show_the_engine_at_work_and_figures_that_later_stages_bring(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(engine={"max_num_seqs": 1})
    slow_down(running.engine, 0.02)
    metrics = type(running.engine).metrics
    monkeypatch.setattr(type(running.engine), "metrics", lambda self: metrics(self) | {"prefix_hit_rate": 0.25})
    with httpx2.stream("POST", f"{running.url}/v1/completions", json=PROMPT | {"stream": True, "max_tokens": 99}):
        waiting = threading.Thread(target=lambda: running.post("/v1/completions", PROMPT))
        waiting.start()
        wait_until(lambda: metrics_of(running)["folovllm_requests_waiting"] == 1)
        now = metrics_of(running)
        assert now["folovllm_requests_running"] == 1
        assert 0 < now["folovllm_kv_usage_ratio"] <= 1
        assert now["folovllm_prefix_hit_rate"] == 0.25
    waiting.join()
    assert metrics_of(running)["folovllm_requests_total,abort"] == 1


def test_the_trace_names_the_requests_and_their_steps(running: Running) -> None:
    request_id = running.post("/v1/completions", PROMPT).headers["x-request-id"]
    trace = running.get("/trace").json()
    rows = {event["args"]["name"]: event["tid"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    own = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == rows[request_id]]
    assert own == ["prefill", "decode", "decode", "decode"]


def test_health_and_names(serve: Serve) -> None:
    running = serve(served_name="mine")
    assert running.get("/health").json() == {"status": "ok", "stage": "m3", "model": "mine"}
    assert running.post("/v1/completions", PROMPT | {"model": "mine"}).json()["model"] == "mine"
    assert error_of(running.post("/v1/completions", PROMPT), 404)["code"] == "model_not_found"
    assert running.get("/docs").status_code == 404, "its page would load scripts from the internet"
