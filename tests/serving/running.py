"""A server on a free port: in this process with its engine at hand, or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai

import stages
from common import Engine, RequestOutput
from common.serving.listener import address, listen
from common.serving.options import ServerOptions
from common.serving.server import Server
from common.serving.service import Service
from common.serving.spans import Spans
from tests.depth import DEEP

ROOT = Path(__file__).parent.parent.parent
TINY = "random:tiny-llama"
ALL = [name.split("_")[0] for name in stages.names()]
SOME = ALL if DEEP else ["m1", "m3", "m7"]
"""For what the server does in the same way with every engine: one of static batches, one of blocks, and the last."""


class Running:
    """A real uvicorn on 127.0.0.1, in a thread; the engine in another. `close()` ends both."""

    def __init__(self, engine: Engine, spans: Spans | None = None, **options: Any) -> None:
        self.engine = engine
        checked = ServerOptions(**({"port": 0} | options))
        self.key = checked.api_keys[0] if checked.api_keys else "none"
        listener = listen(checked)
        self.url = address(listener)
        self.service = Service(engine, checked, spans)
        self.server = Server(self.service)
        self._thread = threading.Thread(target=self.server.run, args=([listener],))
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.http = client_of(self.url)

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        """Of the real library; without its retries, which would hide a 429 or 500."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.http.get(path, **options)

    @contextlib.contextmanager
    def visit(self, body: dict[str, Any]) -> Iterator[http.client.HTTPConnection]:
        """A client that has sent its request, and leaves at the end of the block whatever it got."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.closing(connection):
            yield connection

    def wait_until_told(self) -> None:
        """The engine is in a step, and will hear of a request, or that its client has gone, when it ends."""
        wait_until(lambda: not self.service.thread._commands.empty())

    def wait_until_idle(self) -> None:
        """No request is left, neither in the server nor in the engine, and the cache has everything back."""
        wait_until(lambda: self.service.open_choices == 0)
        future = asyncio.run_coroutine_threadsafe(self.service.thread.call(look), self._loop())
        wait_until(lambda: not self.engine.has_unfinished)
        figures = future.result(10)
        assert (figures["running"], figures["waiting"], figures["swapped"]) == (0, 0, 0)
        assert not self.engine._requests and not self.service.thread._jobs

    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self.service.thread._loop
        assert loop is not None
        return loop

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"


class Process:
    """`python -m stages.m3_paged_kv serve`, or another stage's, on a free port."""

    def __init__(self, *options: str, stage: str = "m3_paged_kv", **popen: Any) -> None:
        tiny = ["--model", TINY, "--device", "cpu", "--dtype", "fp32"]
        command = [sys.executable, "-m", f"stages.{stage}", "serve", "--port", "0", *tiny, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, **{"stdout": pipe, "stderr": pipe} | popen, text=True)
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.greeting)
        assert found, f"{self.greeting!r} {self.process.stderr.read() if self.process.stderr else ''}"
        self.url = found[0]
        self.http = client_of(self.url)

    def end(self) -> tuple[int, str]:
        try:
            _, error = self.process.communicate(timeout=60)
            return self.process.returncode, error
        finally:
            self.kill()

    def kill(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()


def client_of(url: str) -> httpx2.Client:
    """Without certificates, which take 40 ms to load."""
    return httpx2.Client(base_url=url, timeout=60, verify=False)


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """In OpenAI's form, and with the request's id."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


def look(engine: Engine) -> dict[str, Any]:
    while engine.has_unfinished:  # what was aborted in the last step is still to be delivered
        engine.step()
    engine.scheduler.cache.check_integrity()
    return engine.metrics()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def slow_down(engine: Engine, seconds: float) -> list[int]:
    """Each step takes at least so long; the list that is returned counts them."""
    step, steps = engine.step, [0]

    def slow_step() -> list[RequestOutput]:
        steps[0] += 1
        time.sleep(seconds)
        return step()

    engine.step = slow_step
    return steps


class Steps:
    """The engine ends only as many steps as are allowed: whatever a test does meanwhile comes in time."""

    def __init__(self, engine: Engine) -> None:
        self.begun = 0
        self._allowed = threading.Semaphore(0)
        self._step = engine.step
        engine.step = self._next

    def allow(self, more: int = 1000) -> None:
        self._allowed.release(more)

    def _next(self) -> list[RequestOutput]:
        self.begun += 1
        assert self._allowed.acquire(timeout=60), "no further step was allowed"
        return self._step()
