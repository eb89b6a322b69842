"""`serve` as a process of its own: its first line, its end by a signal, its refusals."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable

import pytest

from common.engine import Engine
from common.errors import UserError
from common.serving.listener import listen
from common.serving.options import ServerOptions
from tests.depth import DEEP
from tests.serving.running import Process, wait_until
from tests.test_cli import TINY, cli

BODY = {"model": "random:tiny-llama", "prompt": [1, 2, 3], "max_tokens": 500, "stream": True}


TERM, CTRL_C = (signal.SIGTERM, 0), (signal.SIGINT, 130)
"""Signals, each with the exit status after it."""


@pytest.mark.parametrize(("sent", "status"), [TERM, CTRL_C] if DEEP else [TERM])
def test_a_signal_lets_the_stream_finish_and_ends_the_process(
    start: Callable[..., Process], sent: signal.Signals, status: int
) -> None:
    running = start()
    assert "random:tiny-llama on m3" in running.greeting
    with running.http.stream("POST", "/v1/completions", json=BODY) as response:
        parts = response.iter_bytes()
        body = next(parts)
        os.kill(running.process.pid, sent)
        wait_until(lambda: running.http.get("/health").status_code == 503)
        assert running.http.post("/v1/completions", json=BODY).status_code == 503
        body += b"".join(parts)
    assert body.count(b"data: ") == 501
    assert body.endswith(b"data: [DONE]\n\n")
    code, error = running.end()
    assert code == status, error
    assert "Traceback" not in error
    events = [json.loads(line)["event"] for line in error.splitlines() if line.startswith("{")]
    assert events == ["draining", "response", "request", "response"]


@pytest.mark.parametrize(("sent", "status"), [TERM, CTRL_C] if DEEP else [CTRL_C])
def test_a_drain_that_takes_too_long_ends_anyway(
    start: Callable[..., Process], sent: signal.Signals, status: int
) -> None:
    running = start("--drain", "0", "--api-key", "k")
    seen: list[bytes] = []

    def read() -> None:
        headers = {"Authorization": "Bearer k"}
        with running.http.stream("POST", "/v1/completions", json=BODY, headers=headers) as response:
            for part in response.iter_bytes():
                if not seen:
                    os.kill(running.process.pid, sent)
                seen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(60)
    assert b'"code": "shutting_down"' in b"".join(seen).replace(b'":"', b'": "')
    assert running.end()[0] == status


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "port must be"),
        (["--max-queue", "-1"], "max_queue must be"),
        (["--spans", "paper"], "Choose from: console, otlp"),
        (["--drain", "inf"], "drain must be"),
        (["--host", ""], "host must not be empty"),
        (["--host", "nonsense.invalid"], "Choose another --host"),
        (["--host", "192.0.2.1"], "cannot listen"),
        (["--kv-cache-memory", "10"], "kv_cache_memory"),
    ],
)
def test_bad_options_are_one_line_before_anything_runs(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("serve", "--port", "0", *arguments, *TINY) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert out == "" and len(lines) == 1
    assert lines[0].startswith("error: ") and says in lines[0]


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(ServerOptions(port=0)) as taken:
        assert cli("serve", "--port", str(taken.getsockname()[1]), *TINY) == 2
    assert "Choose another --port" in capsys.readouterr().err


def test_what_spans_need_is_missed_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    assert cli("serve", "--port", "0", "--spans", "otlp", *TINY, build=lambda _: pytest.fail("built")) == 2
    error = f"error: this needs {exporter}, which is not installed: pip install '.[spans]'"
    assert capsys.readouterr().err.splitlines() == [error]


def test_products_compiled_for_each_length_of_a_prompt_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads both when it multiplies for the first time; what a user has set stays."""
    seen: list[str | None] = []
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is as before afterwards
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")

    def build(_: object) -> Engine:
        seen.extend(os.environ.get(name) for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
        raise UserError("enough")

    assert cli("serve", "--port", "0", *TINY, build=build) == 2
    assert seen == ["7", "64"]
