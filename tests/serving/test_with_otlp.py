"""`--spans otlp` as it is used: a server in a process of its own, and a collector that it exports to over HTTP."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from common.serving.spans import spans_to
from tests.depth import DEEP
from tests.serving.running import TINY, Process, Running, wait_until

WHY = "needs the OTLP exporter: make setup, or pip install '.[spans]'"
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=WHY)
service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason=WHY)

Start = Callable[..., Process]
BODY = {"model": TINY, "prompt": [1, 2, 3], "max_tokens": 5}


class Collector:
    """Takes what is exported to it over OTLP/HTTP, as `opentelemetry.proto.collector.trace.v1`."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.asked: list[tuple[str, str | None]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.append((self.path, self.headers["Content-Type"]))
                collector.requests.append(service.ExportTraceServiceRequest.FromString(body))
                answer = service.ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def service_names(self) -> set[str]:
        """One for all spans, if it is right."""
        return {text(part.resource.attributes)["service.name"] for one in self.requests for part in one.resource_spans}

    def spans(self, request_id: str) -> dict[str, Any]:
        """Those of one request, by name."""
        every = [
            span
            for one in list(self.requests)
            for part in one.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]
        [trace] = {span.trace_id for span in every if text(span.attributes).get("request_id") == request_id} or [b""]
        found = [span for span in every if span.trace_id == trace]
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def text(attributes: Any) -> dict[str, str]:
    """Attributes that are text."""
    return {one.key: one.value.string_value for one in attributes if one.value.HasField("string_value")}


def counts(attributes: Any) -> dict[str, int]:
    """Attributes that are whole numbers."""
    return {one.key: one.value.int_value for one in attributes if one.value.HasField("int_value")}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's own collector needs would lead the spans there."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    started = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", started.url)
    yield started
    started.close()


def complete(running: Process | Running) -> str:
    """A request that is answered; its id."""
    response = running.http.post("/v1/completions", json=BODY)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


def leave(running: Process) -> str:
    """A request whose client goes while it is answered; its id."""
    body = BODY | {"stream": True, "max_tokens": 500}
    with running.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())
        return response.headers["x-request-id"]


def stop(running: Process) -> list[dict[str, Any]]:
    """SIGTERM, and then the log: JSON to its last line, also what the exporter has to say."""
    os.kill(running.process.pid, signal.SIGTERM)
    code, error = running.end()
    assert code == 0, error
    return [json.loads(line) for line in error.splitlines()]


def test_a_collector_gets_the_spans_of_requests_that_end_and_of_those_that_are_left(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    running = start("--spans", "otlp")
    before = time.time_ns()
    done = complete(running)
    wait_until(lambda: len(collector.spans(done)) == 4)  # they come while the server runs
    left = leave(running)
    log = stop(running)  # and those that are still there come at its end
    after = time.time_ns()

    assert set(collector.asked) == {("/v1/traces", "application/x-protobuf")}
    assert collector.service_names == {"folovllm"}
    tolerance = 1_000_000  # nanoseconds: between two readings of two clocks
    for request_id, outcome in ((done, "ok"), (left, "abort")):
        spans = collector.spans(request_id)
        root = spans.pop("request")
        assert list(spans) == ["queue", "prefill", "decode"]
        assert text(root.attributes) == {"request_id": request_id, "outcome": outcome}
        assert root.parent_span_id == b""
        assert {span.parent_span_id for span in spans.values()} == {root.span_id}
        edges = [root.start_time_unix_nano]
        for span in spans.values():
            assert span.start_time_unix_nano == edges[-1]
            edges.append(span.end_time_unix_nano)
        assert edges[-1] == root.end_time_unix_nano
        assert edges == sorted(set(edges))
        assert before - tolerance < edges[0] and edges[-1] < after + tolerance
        line = next(line for line in log if line["event"] == "request" and line["request_id"] == request_id)
        assert line["outcome"] == outcome
        assert counts(root.attributes) == {name: line[name] for name in ("prompt_tokens", "output_tokens")}
        lengths = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(edges)]
        assert lengths[0] == pytest.approx(line["queue_s"], abs=1e-5)
        assert sum(lengths[:2]) == pytest.approx(line["ttft_s"], abs=1e-5)
        assert sum(lengths) == pytest.approx(line["e2e_s"], abs=1e-5)
    assert counts(root.attributes)["output_tokens"] < 500
    assert [line for line in log if line["level"] != "info"] == []


def test_the_environment_may_name_the_service(
    serve: Callable[..., Running], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "answers")
    with spans_to("otlp") as spans:
        running = serve(spans=spans)
        complete(running)
        running.close()
    assert collector.service_names == {"answers"}


@pytest.mark.parametrize("nobody", ["answers", "listens"] if DEEP else ["answers"])
def test_without_a_collector_the_server_answers_and_ends_in_a_few_seconds(
    start: Start, monkeypatch: pytest.MonkeyPatch, nobody: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if nobody == "answers":
            listener.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")  # the exporter alone would try for long
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        running = start("--spans", "otlp")
        for _ in range(3):  # while an export is under way
            complete(running)
            time.sleep(0.1)
        begin = time.monotonic()
        log = stop(running)
        assert time.monotonic() - begin < 15
    assert sum(line["event"] == "request" and line["outcome"] == "ok" for line in log) == 3
    assert log[-1]["event"] == "spans lost"
    if nobody == "listens":
        assert any("retrying" in line["event"] for line in log)
