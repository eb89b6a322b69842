"""A line of OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, and its answer, by the server's
application without a socket: what a request may ask, what it gets, and how it is refused are the same."""

import asyncio
import contextlib
import json
import logging
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from starlette.types import ASGIApp

from common.engine import Engine
from common.serving.app import create_app
from common.serving.errors import ApiError, as_api_error
from common.serving.inside import whole
from common.serving.options import ServerOptions
from common.serving.service import Service

URLS = ("/v1/chat/completions", "/v1/completions")
AHEAD = 16  # lines that are open, for each request that can run: one long answer must not hold up the engine
OPEN_BYTES = 1 << 26  # of lines that are open, next to one of any length
ENDLESS = 1 << 20
FINE = b'"response": {"status_code": 200,'
Answering = Callable[[bytes], Coroutine[Any, Any, bytes]]
log = logging.getLogger("folovllm.serving")


@contextlib.asynccontextmanager
async def answering(engine: Engine, served_name: str | None) -> AsyncGenerator[Answering]:
    """Answers a line by a line. Many may be open at the same time."""
    most = engine.scheduler.max_num_seqs
    service = Service(engine, ServerOptions(max_queue=ENDLESS, max_n=most, encode_timeout=1e6, served_name=served_name))
    app = create_app(service)
    service.thread.start(asyncio.get_running_loop())
    try:
        yield lambda line: _answer(app, line)
    finally:
        await asyncio.to_thread(service.thread.stop)


async def in_order(lines: Iterable[bytes], answer: Answering, ahead: int) -> AsyncIterator[bytes]:
    """The answers to lines, in their order; `ahead` are open at most."""
    tasks: deque[tuple[asyncio.Task[bytes], int]] = deque()
    size = 0
    for line in lines:
        tasks.append((asyncio.create_task(answer(line)), len(line)))
        size += len(line)
        while tasks and (len(tasks) >= ahead or size > OPEN_BYTES or tasks[0][0].done()):
            task, length = tasks.popleft()
            size -= length
            yield await task
    for task, _ in tasks:
        yield await task


def custom_id(line: bytes) -> str | None:
    """Of a line or of its answer; None where there is no text."""
    try:
        fields: Any = json.loads(line)
        return given if isinstance(given := fields.get("custom_id"), str) else None
    except (ValueError, AttributeError, RecursionError):
        return None


async def _answer(app: ASGIApp, line: bytes) -> bytes:
    """Whatever is wrong with a line is its answer."""
    request_id, name = uuid.uuid4().hex, custom_id(line)
    try:
        url, body = _request(line)
        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": url, "headers": [(b"content-type", b"application/json")],
            "query_string": b"", "state": {"request_id": request_id, "salt": None},
        }  # fmt: skip
        status, _, answer = await whole(app, scope, body)
    except Exception as error:
        if not isinstance(error, ApiError | RecursionError):
            log.exception("line failed", extra={"fields": {"request_id": request_id}})
        refused = as_api_error(None, error)
        status, answer = refused.status_code, json.dumps(refused.body()).encode()
    head = json.dumps({"id": f"batch_req_{request_id}", "custom_id": name})
    said = b'%s, "response": {"status_code": %d, "request_id": "%s", "body": %s}, "error": null}\n'
    return said % (head[:-1].encode(), status, request_id.encode(), answer)


def _request(line: bytes) -> tuple[str, bytes]:
    """Its URL and body."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ApiError(400, "This line is no JSON.", code="invalid_json_line") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "This line is no JSON object.", code="invalid_json_line")
    given: dict[str, Any] = fields
    if not isinstance(given.get("custom_id"), str):
        raise ApiError(400, "Missing required parameter: 'custom_id', a text.", param="custom_id")
    if given.get("method") != "POST":
        raise ApiError(400, "'method' must be POST.", param="method", code="invalid_method")
    if given.get("url") not in URLS:
        raise ApiError(400, f"'url' must be one of {' and '.join(URLS)}.", param="url", code="invalid_url")
    body: Any = given.get("body")
    if not isinstance(body, dict):
        raise ApiError(400, "'body' must be a JSON object.", param="body")
    if body.get("stream"):  # pyright: ignore[reportUnknownMemberType]
        raise ApiError(400, "The answers of a batch are not streamed.", param="body.stream")
    return given["url"], json.dumps(body).encode()
