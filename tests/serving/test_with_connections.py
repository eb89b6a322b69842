"""Clients that are silent, slow, gone, or read nothing: each limit, and that others are answered meanwhile."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from common.serving import connections
from common.serving.connections import SPARE
from common.serving.logs import JsonLines
from tests.serving.running import ROOT, TINY, Process, Running, client_of, slow_down, wait_until
from tests.serving.test_with_metrics import metrics_of

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}
PATIENT = {"header_timeout": 60.0, "body_timeout": 60.0, "keep_alive": 60.0, "read_timeout": 60.0}


def connect(running: Running | Process) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def ends(client: socket.socket, trickle: bytes = b"") -> bytes:
    """Everything that comes until the server ends the connection, while one byte of `trickle` goes out each 50 ms."""
    received, started = b"", time.monotonic()
    client.settimeout(0.05)
    for number in range(400):
        try:
            if trickle:
                client.send(trickle[number % len(trickle) :][:1])
            part = client.recv(1 << 16)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return received
        if not part:
            return received
        received += part
    raise AssertionError(f"still open after {time.monotonic() - started:.0f} s: {received!r}")


def head(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


BODY = head("/v1/completions", "Content-Type: application/json", "Content-Length: 5000", method="POST")


@pytest.mark.parametrize(
    ("limit", "opening", "trickle", "status"),
    [
        ("header_timeout", b"", b"", b""),  # silent
        ("header_timeout", b"GET /health HTTP/1.1\r\nX: ", b"y", b"408"),
        ("header_timeout", head("/health") + b"GET ", b"y", b"200"),  # the second request of a connection
        ("body_timeout", BODY, b"", b"408"),
        ("body_timeout", BODY, b" ", b"408"),
        ("body_timeout", BODY.replace(b"5000", b"9000000000"), b" ", b"413"),  # answered, and sends on
        ("keep_alive", head("/health"), b"", b"200"),
    ],
)
def test_who_keeps_the_server_waiting_is_let_go(
    serve: Serve, clients: ExitStack, limit: str, opening: bytes, trickle: bytes, status: bytes
) -> None:
    running = serve(**PATIENT | {limit: 0.3})
    client = clients.enter_context(connect(running))
    client.sendall(opening)
    received = ends(client, trickle)
    assert received.split(b" ", 2)[1:2] == ([status] if status else []), received
    if status == b"408":
        error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "request_timeout"
    wait_until(lambda: len(running.server.connections.open) <= 1)
    assert running.post("/v1/completions", PROMPT).status_code == 200


def test_patient_limits_leave_connections_alone(serve: Serve, clients: ExitStack) -> None:
    """A whole answer may take longer than all limits, and each request of a connection has the time anew."""
    running = serve(**dict.fromkeys(PATIENT, 0.5))
    slow_down(running.engine, 0.3)
    client = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=20)
    clients.callback(client.close)
    client.connect()
    first = client.sock
    for _ in range(2):
        client.request("POST", "/v1/completions", json.dumps(PROMPT), {"Content-Type": "application/json"})
        response = client.getresponse()
        assert response.status == 200 and response.read()
        time.sleep(0.3)
    assert client.sock is first is not None, "it was one connection all the time"


def test_a_stream_that_nobody_reads_ends_and_gives_its_memory_back(serve: Serve, clients: ExitStack) -> None:
    running = serve(talks=False, read_timeout=0.3)
    small = clients.enter_context(socket.socket())
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    for server in running.server.servers:
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    small.connect(server.sockets[0].getsockname())
    slow_down(running.engine, 0.002)
    body = json.dumps(
        PROMPT | {"stream": True, "max_tokens": 500, "prompt": [1, 2], "n": 8, "logprobs": 5, "ignore_eos": True}
    ).encode()
    small.sendall(BODY.replace(b"5000", str(len(body)).encode()) + body)
    wait_until(lambda: running.service.open_choices == 8)
    wait_until(lambda: metrics_of(running)["folovllm_requests_total,abort"] == 1)
    running.wait_until_idle()


@pytest.mark.parametrize("buffer", [1 << 12, 1 << 17])
def test_a_slow_reader_gets_all_of_one_large_write(serve: Serve, clients: ExitStack, buffer: int) -> None:
    """It is behind all the time, but takes a little; with a large buffer, the kernel asks for more once in a while."""
    running = serve(talks=False, read_timeout=0.3)
    small = clients.enter_context(socket.socket())
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for server in running.server.servers:
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    small.connect(server.sockets[0].getsockname())
    wanted = {"max_tokens": 200, "prompt": [1, 2], "n": 8, "logprobs": 5, "ignore_eos": True}
    body = json.dumps(PROMPT | wanted).encode()
    small.sendall(BODY.replace(b"5000", str(len(body)).encode()) + body)
    received, started = small.recv(1 << 12), time.monotonic()
    _, _, length = received.partition(b"content-length: ")
    size = received.index(b"\r\n\r\n") + 4 + int(length.partition(b"\r\n")[0])
    while len(received) < size:
        slow = time.monotonic() - started < 1.5
        part = small.recv(1 << (10 if slow else 16))
        assert part, f"cut after {len(received)} of {size} bytes, {time.monotonic() - started:.1f} s"
        received += part
        time.sleep(0.02 if slow else 0)
    assert json.loads(received.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 1600


@pytest.mark.parametrize("pipelined", [b"", b"\r\n", head("/health"), head("/health") * 100])
def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_ahead(
    serve: Serve, clients: ExitStack, pipelined: bytes
) -> None:
    """uvicorn alone stops reading at a second request, and then does not see the end of the connection."""
    running = serve(talks=False)
    slow_down(running.engine, 0.02)
    client = clients.enter_context(connect(running))
    body = json.dumps(PROMPT | {"max_tokens": 500, "prompt": [1, 2], "ignore_eos": True}).encode()
    client.sendall(BODY.replace(b"5000", str(len(body)).encode()) + body)
    wait_until(lambda: running.service.open_choices == 1)
    for part in (pipelined[:-3], pipelined[-3:]):
        client.sendall(part)
        time.sleep(0.05)
    client.close()
    wait_until(lambda: running.service.open_choices == 0, 5)
    assert metrics_of(running)["folovllm_requests_total,abort"] == 1


def test_pipelined_requests_are_answered_in_order(running: Running, clients: ExitStack) -> None:
    client = clients.enter_context(connect(running))
    client.sendall(head("/health") * 50 + head("/v1/nothing") + head("/health", "Connection: close"))
    answers = ends(client).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 50 + [b"404", b"200"]


def test_what_clients_write_fills_no_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """10,000 lines may wait for a reader of the log."""
    caplog.set_level("INFO", "folovllm.serving")
    assert running.get("/" + "a" * 10_000).status_code == 404
    wait_until(lambda: any(record.message == "response" for record in caplog.records))
    [line] = [JsonLines().format(record) for record in caplog.records if record.message == "response"]
    assert len(line) < 1000


@pytest.mark.parametrize(("leaves", "status"), [(False, 408), (True, 499)])
def test_the_log_has_the_status_of_a_body_that_does_not_come(
    serve: Serve, clients: ExitStack, caplog: pytest.LogCaptureFixture, leaves: bool, status: int
) -> None:
    caplog.set_level("INFO", "folovllm.serving")
    running = serve(**PATIENT | {"body_timeout": 60.0 if leaves else 0.3})
    client = clients.enter_context(connect(running))
    client.sendall(BODY + b"{")
    wait_until(lambda: any(c.waits_for == "body" for c in list(running.server.connections.open)))
    if leaves:
        client.close()
    else:
        assert b" 408 " in ends(client)
    wait_until(lambda: any(r.message == "response" for r in caplog.records))
    fields = [r.__dict__["fields"] for r in caplog.records if r.message == "response"]
    assert [one["status"] for one in fields] == [status]
    assert metrics_of(running)[f"folovllm_http_responses_total,/v1/completions,{status}"] == 1


def test_no_client_has_more_than_a_little_read_at_once(
    running: Running, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of one byte takes as long to parse as any: 256 KiB of them kept all others waiting for half a second."""
    sizes: list[int] = []
    take = connections.Connection.data_received
    monkeypatch.setattr(
        connections.Connection, "data_received", lambda self, data: (sizes.append(len(data)), take(self, data))[1]
    )
    client = clients.enter_context(connect(running))
    text = json.dumps(PROMPT | {"prompt": "x" * 400}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 20_000 + text) + b"0\r\n\r\n"
    start = head("/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: close",
                 method="POST")  # fmt: skip
    client.sendall(start + chunks)
    assert ends(client).startswith(b"HTTP/1.1 200 ")
    assert sum(sizes) == len(start + chunks) and max(sizes) <= connections.AT_ONCE


def test_a_body_of_two_lengths_is_refused_and_the_connection_ends(running: Running, clients: ExitStack) -> None:
    """A proxy in front may believe the other one, and take the rest for another client's request."""
    client = clients.enter_context(connect(running))
    both = ("Content-Type: application/json", "Content-Length: 12", "Transfer-Encoding: chunked")
    client.sendall(head("/v1/completions", *both, method="POST") + b"2\r\n{}\r\n0\r\n\r\n" + head("/health"))
    answers = ends(client).split(b"HTTP/1.1 ")[1:]
    assert len(answers) == 1 and answers[0].startswith(b"400 ") and b'"invalid_http"' in answers[0]


def test_silent_clients_make_room_for_those_that_ask(serve: Serve, clients: ExitStack) -> None:
    running = serve(max_connections=8, **PATIENT)
    silent = [clients.enter_context(connect(running)) for _ in range(20)]
    for _ in range(3):
        client = clients.enter_context(client_of(running.url))
        assert client.post("/v1/completions", json=PROMPT).status_code == 200
    wait_until(lambda: len(running.server.connections.open) <= 8)
    assert len(ends(silent[0])) == 0, "the one that was silent longest is the first to go"


PIPELINED = head("/openapi.json") * 400


@pytest.mark.parametrize("opening", [BODY, BODY + b"{", BODY.replace(b"5000", b"9000000000"), PIPELINED],
                         ids=["no body", "half a body", "answered, no body", "reads nothing"])  # fmt: skip
def test_clients_that_hold_a_place_with_a_request_make_room_too(
    serve: Serve, clients: ExitStack, opening: bytes
) -> None:
    """A thousand of them would keep all others out for half a minute, again and again."""
    running = serve(max_connections=8, **PATIENT)
    running.http.close()
    for _ in range(8):
        client = clients.enter_context(connect(running))
        client.setblocking(False)
        client.send(opening)
    waiting = ("body", "read")
    wait_until(lambda: [c.waits_for in waiting for c in list(running.server.connections.open)] == [True] * 8)
    for _ in range(3):
        with client_of(running.url) as client:
            assert client.post("/v1/completions", json=PROMPT).status_code == 200
    assert len(running.server.connections.open) > 4, "only as many as were needed"


def test_when_all_places_are_busy_the_next_one_is_refused(serve: Serve, clients: ExitStack) -> None:
    running = serve(max_connections=3, **PATIENT)
    running.http.close()
    slow_down(running.engine, 0.02)
    for _ in range(3):
        clients.enter_context(running.visit(PROMPT | {"stream": True, "max_tokens": 400}))
    wait_until(lambda: running.service.open_choices == 3)
    answer = ends(clients.enter_context(connect(running)))
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"too_many_connections"' in answer
    clients.close()
    running.wait_until_idle()
    with client_of(running.url) as client:
        assert client.get("/health").status_code == 200


def test_1100_silent_sockets_against_1024_descriptors(clients: ExitStack) -> None:
    """They take a while to be let go: others are answered all the time, and the log says what happened once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this process may not open so many sockets itself")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    running = Process(
        "--max-connections", "5000", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    )
    clients.callback(running.kill)
    silent = [clients.enter_context(connect(running)) for _ in range(1100)]
    for _ in range(5):
        with client_of(running.url) as client:
            assert client.post("/v1/completions", json=PROMPT | {"prompt": [1, 2, 3]}).status_code == 200
            taken = metrics_of(client)["folovllm_connections"]
            assert 500 < taken < 1024 - SPARE
    for client in silent:
        client.close()
    running.process.terminate()
    code, log = running.end()
    assert code == 0 and len(log.splitlines()) < 20, log[-2000:]
    assert "out of system resource" not in log and '"fewer connections, by ulimit -n"' in log


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import resource; from common.serving.connections import _within_descriptors as within\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 700)); print(within(300), within(2000))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = map(int, out.splitlines()[0].split())
    assert first == 300 and 500 < second <= 700 - SPARE
    assert out.splitlines()[1] == "(700, 700)"
    assert connections._within_descriptors(1) == 1
    monkeypatch.setitem(sys.modules, "resource", None)
    assert connections._within_descriptors(2**40) == 2**40, "where there is no such limit"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",  # TLS
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000,
    ],
)
def test_what_is_not_http_is_refused_in_the_usual_form(running: Running, clients: ExitStack, nonsense: bytes) -> None:
    client = clients.enter_context(connect(running))
    client.sendall(nonsense)
    answer = ends(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
