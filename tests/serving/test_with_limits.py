"""Who may use the server, and for how much: limits, the queue, options, keys."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel, ValidationError

from common import Engine
from common.errors import UserError
from common.serving import formats, parameters
from common.serving.gate import salt_of
from common.serving.listener import listen
from common.serving.options import ServerOptions
from common.serving.schema import ChatRequest, CompletionRequest
from common.serving.service import LONG_TEXT
from common.text.prompts import Prompt
from tests.serving.running import TINY, Running, Steps, error_of, slow_down, wait_until

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {"model": TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_with_its_length_stated_or_not(serve: Serve) -> None:
    running = serve(max_body=1000)
    long = PROMPT | {"prompt": "x" * 2000}
    assert "over 1000 bytes" in error_of(running.post("/v1/completions", long), 413)["message"]

    def chunks() -> Iterator[bytes]:
        yield from (json.dumps(long).encode()[i : i + 100] for i in range(0, 2000, 100))

    headers = {"Content-Type": "application/json"}
    response = running.http.post("/v1/completions", content=chunks(), headers=headers)
    assert "over 1000 bytes" in error_of(response, 413)["message"]
    assert running.post("/v1/completions", PROMPT).status_code == 200


def test_limits_on_prompts_answers_and_tokens(serve: Serve) -> None:
    running = serve(max_prompt_tokens=10, max_n=2, max_tokens=6)
    too_long = error_of(running.post("/v1/completions", PROMPT | {"prompt": [1] * 11}), 400)
    assert "11 tokens; this server takes 10" in too_long["message"]
    assert error_of(running.post("/v1/completions", PROMPT | {"n": 3}), 400)["param"] == "n"
    assert error_of(running.post("/v1/completions", PROMPT | {"prompt": ["a", "b", "c"]}), 400)["param"] == "n"
    assert error_of(running.post("/v1/completions", PROMPT | {"max_tokens": 7}), 400)["param"] == "max_tokens"
    chat = CHAT | {"messages": [{"role": "user", "content": "x"}]}
    del chat["max_tokens"]
    assert running.post("/v1/chat/completions", chat).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (CompletionRequest, "prompt", [-1]),
        (CompletionRequest, "prompt", [{}]),
        (CompletionRequest, "prompt", [[-1]]),
        (CompletionRequest, "stop_token_ids", [""]),
        (CompletionRequest, "stop", [0]),
        (ChatRequest, "messages", [0]),
        (ChatRequest, "messages", [{}]),
        (ChatRequest, "messages", [{"role": "user", "content": [0] * 5000}]),
        (ChatRequest, "messages", [{str(n): 0 for n in range(5000)}]),
        (CompletionRequest, "stream_options", {str(n): 0 for n in range(5000)}),
    ],
)
def test_a_megabyte_of_mistakes_is_answered_with_few_complaints(
    kind: type[BaseModel], field: str, values: list[Any] | dict[str, Any]
) -> None:
    """Must not be a megabyte of complaints, made while all others wait: 340,000 of them took 23 s."""
    many = values * 5000 if isinstance(values, list) else values
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": TINY, "prompt": "x", field: many} if kind is CompletionRequest
                            else {"model": TINY, field: many})  # fmt: skip
    assert wrong.value.error_count() < 12


def test_a_full_queue_answers_429_and_takes_more_later(serve: Serve) -> None:
    running = serve(engine={"max_num_seqs": 1}, max_queue=2)
    steps = Steps(running.engine)
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(running.post("/v1/completions", PROMPT))) for _ in "123"]
    for thread in threads:
        thread.start()
    wait_until(lambda: running.service.open_choices == 3)
    refused = running.post("/v1/completions", PROMPT)
    assert error_of(refused, 429)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"
    steps.allow()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert running.post("/v1/completions", PROMPT).status_code == 200
    assert error_of(running.post("/v1/completions", PROMPT | {"n": 4}), 400)["param"] == "n", "it would never fit"


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tiny engine's vocabulary a token is a byte, so that 512 tokens have 512 characters at most."""
    running = serve()
    encoded: list[Any] = []
    monkeypatch.setattr(parameters, "encode", lambda *given: (encoded.append(given), [1])[1])
    for path, change in (
        ("completions", {"prompt": "x" * 513}),
        ("completions", {"prompt": ["x", "x" * 513]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 300}] * 2}),
    ):
        body = (PROMPT if path == "completions" else CHAT) | change
        error = error_of(running.post(f"/v1/{path}", body), 400)
        assert error["code"] == "context_length_exceeded"
        assert "characters; this server takes 512 at most" in error["message"]
    assert not encoded
    assert running.post("/v1/completions", PROMPT | {"prompt": "x" * 512}).status_code == 200 and len(encoded) == 1


def test_prompts_that_are_being_encoded_have_their_places(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones are encoded one at a time, short ones meanwhile; what finds no place is not encoded at all."""
    running = serve(engine={"max_num_seqs": 1}, max_queue=3)
    running.service._longest_text = None
    encode, go = parameters.encode, threading.Event()
    encoding: list[int] = []

    def encode_slowly(engine: Engine, prompt: Prompt, *rest: Any) -> list[int]:
        encoding.append(len(prompt))
        if len(prompt) > LONG_TEXT:
            assert go.wait(30)
            raise UserError("too long")
        return encode(engine, prompt, *rest)

    monkeypatch.setattr(parameters, "encode", encode_slowly)
    statuses: list[int] = []
    long = PROMPT | {"prompt": "x" * (LONG_TEXT + 1)}
    threads = [
        threading.Thread(target=lambda: statuses.append(running.post("/v1/completions", long).status_code))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: running.service.open_choices == 3)
    assert running.post("/v1/completions", PROMPT).status_code == 200, "it does not wait for them"
    assert error_of(running.post("/v1/completions", PROMPT | {"n": 2}), 429)
    assert sorted(encoding) == [5, LONG_TEXT + 1]
    go.set()
    for thread in threads:
        thread.join()
    assert statuses == [400, 400, 400]
    assert running.service.open_choices == 0, "what was refused gives its place back"


def test_no_request_waits_longer_than_one_budget_for_the_prompts_of_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slow short prompts hold both threads, and a slow long one its own: the next of a kind gets 503, in time."""
    running = serve(encode_timeout=0.3)
    running.service._longest_text = None
    encode, go, slow = parameters.encode, threading.Event(), threading.Semaphore(0)

    def encode_slowly(engine: Engine, prompt: Prompt, *rest: Any) -> list[int]:
        if prompt[0] == "s":
            slow.release()
            assert go.wait(30)
        return encode(engine, prompt, *rest)

    monkeypatch.setattr(parameters, "encode", encode_slowly)
    statuses: list[int] = []

    def post(text: str) -> None:
        statuses.append(running.post("/v1/completions", PROMPT | {"prompt": text}).status_code)

    threads = [threading.Thread(target=post, args=(text,)) for text in ("s", "s", "s" * (LONG_TEXT + 1))]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert slow.acquire(timeout=30)
    for text in ("short", "l" * (LONG_TEXT + 1)):
        started = time.perf_counter()
        refused = running.post("/v1/completions", PROMPT | {"prompt": "a" + text})
        assert error_of(refused, 503)["code"] == "encoding_timeout" and refused.headers["retry-after"] == "1"
        assert 0.25 < time.perf_counter() - started < 5
    assert running.get("/health").status_code == 200 and running.get("/trace").status_code == 200
    go.set()
    for thread in threads:
        thread.join()
    assert statuses == [503, 503, 503], "its own time counts, too"
    assert running.service.open_choices == 0
    wait_until(lambda: running.post("/v1/completions", PROMPT).status_code == 200)


def test_all_that_is_rendered_counts_as_a_long_text(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    running.service._longest_text = None
    monkeypatch.setattr(parameters, "in_plain_text", lambda _, messages, tools: messages)  # the template knows tools
    threads: list[str] = []
    monkeypatch.setattr(parameters, "encode", lambda *_: (threads.append(threading.current_thread().name), [1])[1])
    empty = {"role": "user", "content": ""}
    tool = {"type": "function", "function": {"name": "f", "description": "x" * LONG_TEXT}}
    call = {"function": {"name": "f", "arguments": json.dumps({"x": "y" * LONG_TEXT})}}
    for change in ({}, {"messages": [empty] * 1000}, {"chat_template_kwargs": {"a": "x" * LONG_TEXT}},
                   {"tools": [tool]}, {"messages": [{"role": "assistant", "tool_calls": [call]}]}):  # fmt: skip
        assert running.post("/v1/chat/completions", CHAT | change).status_code == 200
    assert len({name.partition("_")[0] for name in threads[1:]}) == 1
    assert threads[0].partition("_")[0] != threads[1].partition("_")[0]
    assert running.post("/v1/completions", PROMPT | {"prompt": [1] * 100}).status_code == 200
    assert threads[-1].partition("_")[0] == threads[0].partition("_")[0]


def test_large_answers_and_conversations_are_not_made_on_the_event_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 answers of 400 tokens with 20 log-probabilities took 1.5 s, in which nobody else got a token."""
    running = serve()
    threads: set[int] = set()
    for owner, name in ((formats.ChatFormat, "whole"), (parameters, "conversation")):
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, work=work: (threads.add(threading.get_ident()), work(*a))[1])
    assert running.post("/v1/chat/completions", CHAT | {"logprobs": True, "n": 3}).status_code == 200
    assert threads and running.server.servers and running._thread.ident not in threads


def test_a_top_k_beyond_all_numbers_disturbs_no_other_request(serve: Serve) -> None:
    running = serve()
    slow_down(running.engine, 0.005)
    statuses: list[int] = []
    beside = threading.Thread(
        target=lambda: statuses.append(running.post("/v1/completions", PROMPT | {"max_tokens": 100}).status_code)
    )
    beside.start()
    wait_until(lambda: running.service.open_choices == 1)
    drawn = PROMPT | {"temperature": 1, "seed": 1}
    huge, none = (running.post("/v1/completions", drawn | {"top_k": k}).json()["choices"] for k in (10**30, 0))
    assert huge == none
    beside.join()
    assert statuses == [200]


@pytest.mark.parametrize(
    "options",
    [{"port": 70000}, {"host": ""}, {"drain": float("inf")}, {"drain": float("nan")},
     {"api_keys": ("",)}, {"api_keys": ("ключ",)}, {"max_queue": -1}, {"max_body": 0}, {"max_n": 0},
     {"drain": -1.0}, {"spans": "paper"}, {"nonsense": 1}, {"admin_key": ""}, {"admin_key": "ключ"},
     {"max_connections": 0}, {"header_timeout": 0.0}, {"body_timeout": float("inf")}, {"read_timeout": float("nan")},
     {"encode_timeout": -1.0}, {"keep_alive": 0.0}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ServerOptions(**options)


def test_a_port_in_use_and_an_address_that_is_not_ours_are_refused() -> None:
    with listen(ServerOptions(port=0)) as taken, pytest.raises(UserError, match="Choose another --port"):
        listen(ServerOptions(port=taken.getsockname()[1]))
    for host in ("192.0.2.1", "nonsense.invalid", "a..b"):
        with pytest.raises(UserError, match=r"cannot listen.*Choose another --host"):
            listen(ServerOptions(host=host, port=0))


def test_two_that_start_together_cannot_have_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have bound it before one of them listens."""
    listener, begin = socket.socket.listen, socket.socket.bind
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bind(self: socket.socket, address: Any) -> None:
            begin(self, address)
            monkeypatch.undo()
            other.bind(self.getsockname())
            listener(other)

        monkeypatch.setattr(socket.socket, "bind", bind)
        with pytest.raises(UserError, match="Choose another --port"):
            listen(ServerOptions(port=0))


# -- names and keys ----------------------------------------------------------------------------------------------------


def test_names_that_were_made_to_lead_here_are_refused(serve: Serve) -> None:
    """DNS rebinding: a page of evil.example, whose address is suddenly 127.0.0.1, may read what it gets from there."""
    running = serve()
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]:80"):
        error = error_of(running.get("/v1/models", headers={"Host": name}), 400)
        assert error["code"] == "host_not_allowed"
    for name in ("localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8000"):
        assert running.get("/v1/models", headers={"Host": name}).status_code == 200
    with_key = serve(api_keys=("k",))
    headers = {"Host": "my.example", "Authorization": "Bearer k"}
    assert with_key.get("/v1/models", headers=headers).status_code == 200, "with the key, any name may be used"
    assert serve(host="0.0.0.0").get("/v1/models", headers={"Host": "my.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("my.example", False)],
)  # fmt: skip
def test_who_listens_to_this_machine_alone(host: str, loopback: bool) -> None:
    assert ServerOptions(host=host).loopback == loopback


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


def test_what_all_keys_did_is_for_the_admin_alone(serve: Serve) -> None:
    running = serve(api_keys=("a",), admin_key="root")
    for path in ("/metrics", "/trace"):
        assert error_of(running.get(path), 401)
        assert error_of(running.get(path, headers={"Authorization": "Bearer a"}), 401)
        assert running.get(path, headers={"Authorization": "Bearer root"}).status_code == 200
    assert error_of(running.post("/v1/completions", PROMPT, headers={"Authorization": "Bearer root"}), 401)
    assert serve(admin_key="root").get("/metrics").status_code == 401, "also where all may ask for answers"


@pytest.mark.parametrize(
    ("client", "header", "status"),
    [("127.0.0.1", "", 200), ("::1", "", 200), ("192.0.2.1", "", 403), ("fe80::1%eth0", "", 403),
     ("127.0.0.1", "X-Forwarded-For", 403), ("127.0.0.1", "Forwarded", 403), ("127.0.0.1", "X-Real-IP", 403),
     ("127.0.0.1", "Via", 403), ("127.0.0.1", "X-Forwarded-Host", 403)],
)  # fmt: skip
def test_without_an_admin_key_it_is_for_this_machine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, client: str, header: str, status: int
) -> None:
    monkeypatch.setattr("uvicorn.protocols.http.h11_impl.get_remote_addr", lambda _: (client, 1))
    headers = {"Authorization": "Bearer a"} | ({header: "for=192.0.2.1"} if header else {})
    running = serve(host="0.0.0.0", api_keys=("a",))
    for path in ("/metrics", "/trace"):
        answer = running.get(path, headers=headers)
        assert answer.status_code == status
        assert status == 200 or error_of(answer, 403)["code"] == "admin_only"
        assert error_of(running.get(path), 401)


def test_without_keys_all_that_are_answered_see_the_figures(serve: Serve) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        assert [serve(host=host).get(path).status_code for path in ("/metrics", "/trace")] == [200, 200]


def test_the_cache_salt_follows_the_key(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that takes one: it arrives, differs from key to key, and is not the key."""
    running = serve(api_keys=("a", "b"))
    salts: list[str | None] = []
    add = running.engine.add_request

    def add_request(prompt: Any, params: Any = None, *, cache_salt: str | None = None, **options: Any) -> str:
        salts.append(cache_salt)
        return add(prompt, params, **options)

    monkeypatch.setattr(running.engine, "add_request", add_request)
    for key in "aba":
        running.post("/v1/completions", PROMPT, headers={"Authorization": f"Bearer {key}"})
    assert salts == [salt_of(b"a"), salt_of(b"b"), salt_of(b"a")]
    assert len(set(salts)) == 2 and "a" not in salts
