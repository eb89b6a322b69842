"""What is left behind of a request: spans, and lines of the log."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.serving.logs import JsonLines, Writer
from common.serving.spans import Spans, spans_to
from tests.serving.running import TINY, Running, Steps, wait_until

Serve = Callable[..., Running]
BODY = {"model": TINY, "prompt": "hello", "max_tokens": 5}


def test_a_request_is_a_span_and_in_it_queue_prefill_and_decode(serve: Serve) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = serve(spans=Spans(provider))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    response = running.post("/v1/completions", BODY, headers=headers)
    wait_until(lambda: len(exporter.get_finished_spans()) == 4)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans.pop("request")
    assert list(spans) == ["queue", "prefill", "decode"]
    assert f"{root.context.trace_id:032x}" == trace_id, "part of the client's trace"
    assert root.attributes == {
        "request_id": response.headers["x-request-id"], "outcome": "ok", "prompt_tokens": 5, "output_tokens": 5,
    }  # fmt: skip
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in spans.values())
    edges = [root.start_time]
    for span in spans.values():
        assert span.start_time == pytest.approx(edges[-1], abs=2000)
        edges.append(span.end_time)
    assert edges == sorted(edges) and edges[-1] == pytest.approx(root.end_time, abs=2_000_000)


def test_a_request_that_is_aborted_while_it_waits_has_only_been_in_the_queue(serve: Serve) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = serve(engine={"max_num_seqs": 1}, spans=Spans(provider))
    steps = Steps(running.engine)
    with running.visit(BODY | {"stream": True, "max_tokens": 30}) as first:
        wait_until(lambda: steps.begun == 1)
        with running.visit(BODY):
            running.wait_until_told()
            steps.allow(3)
            wait_until(lambda: steps.begun == 4)
        running.wait_until_told()
        steps.allow(3)
        wait_until(lambda: len(exporter.get_finished_spans()) == 2)
        assert [span.name for span in exporter.get_finished_spans()] == ["queue", "request"]
        assert (exporter.get_finished_spans()[1].attributes or {})["outcome"] == "abort"
        steps.allow()
        first.getresponse().read()


def test_spans_follow_the_clock_on_the_wall(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = serve(spans=Spans(provider))
    clock = time.time
    monkeypatch.setattr("common.serving.spans.time.time", lambda: clock() + 3600)  # set, or the machine has slept
    running.post("/v1/completions", BODY)
    wait_until(lambda: len(exporter.get_finished_spans()) == 4)
    assert exporter.get_finished_spans()[-1].start_time == pytest.approx((clock() + 3600) * 1e9, abs=60e9)


def test_an_exporter_that_is_not_installed_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ModuleNotFoundError, match="trace_exporter"), spans_to("otlp"):
        pass
    with spans_to("console") as spans:
        assert spans is not None
    with spans_to(None) as spans:
        assert spans is None


def test_the_log_has_a_line_for_each_response_and_each_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    running = serve(api_keys=("secret-key",))
    with caplog.at_level(logging.INFO, "folovllm.serving"):
        headers = {"Authorization": "Bearer secret-key"}
        response = running.post("/v1/completions", BODY | {"prompt": "private words"}, headers=headers)
        running.get("/v1/models")
        running.get("/health")
        wait_until(lambda: len(caplog.records) >= 3)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    request = next(line for line in lines if line["event"] == "request")
    responses = [line for line in lines if line["event"] == "response"]
    assert request["request_id"] == responses[0]["request_id"] == response.headers["x-request-id"]
    assert {name: request[name] for name in ("outcome", "prompt_tokens", "output_tokens", "finish_reason")} == {
        "outcome": "ok", "prompt_tokens": 13, "output_tokens": 5, "finish_reason": "length",
    }  # fmt: skip
    assert 0 <= request["queue_s"] <= request["ttft_s"] <= request["e2e_s"]
    assert [(line["path"], line["status"]) for line in responses] == [("/v1/completions", 200), ("/v1/models", 401)]
    assert "secret-key" not in caplog.text and "private" not in caplog.text


def test_a_failure_is_in_the_log_with_its_traceback_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, writer = logging.getLogger("folovllm.serving"), Writer(2)
    monkeypatch.setattr(logger, "handlers", [writer])
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logger.exception("step failed", extra={"fields": {"request_id": "r1"}})
    assert writer.flushed()
    [line] = capfd.readouterr().err.splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["event"], fields["request_id"]) == ("error", "step failed", "r1")
    assert "RuntimeError: broken" in fields["traceback"]
