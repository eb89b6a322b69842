"""A line of OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, and its answer, by the server's
application without a socket: what a request may ask, what it gets, and how it is refused are the same."""

import asyncio
import json
import math
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, BinaryIO, Literal

from pydantic import ValidationError
from starlette.types import ASGIApp

from common.serving.app import create_app, messages_of
from common.serving.errors import UNREADABLE, ApiError, from_validation
from common.serving.schema import Body
from common.serving.service import Service

HEADERS = [(b"content-type", b"application/json")]
BEGIN = b'{"id": "batch_req_'  # of an answer
AHEAD = 16  # lines that are open, for each request that can run: one long answer must not hold up the engine
OPEN_BYTES = 1 << 26  # of lines that are open


class Line(Body):
    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


def read_lines(file: BinaryIO, begin: int = 0, end: float = math.inf) -> Iterator[bytes]:
    """Those that are not blank and begin between two places."""
    file.seek(max(0, begin - 1))
    line = file.readline() if begin else b""
    while file.tell() < end and (line := file.readline()):
        if line.strip():
            yield line


def custom_id(line: bytes) -> str | None:
    """Of a line or of its answer; None where there is no text."""
    try:
        fields: Any = json.loads(line)
        return given if isinstance(given := fields.get("custom_id"), str) else None
    except (ValueError, AttributeError, RecursionError):
        return None


async def answers_to(lines: Iterable[bytes], service: Service) -> AsyncIterator[bytes]:
    """In the order of the lines, few of which are open at a time."""
    app, most = create_app(service), AHEAD * service.engine.scheduler.max_num_seqs
    tasks: deque[tuple[asyncio.Task[bytes], int]] = deque()
    size = 0
    for line in lines:
        tasks.append((asyncio.create_task(_answer(line, app)), len(line)))
        size += len(line)
        while tasks and (len(tasks) >= most or size > OPEN_BYTES or tasks[0][0].done()):
            task, length = tasks.popleft()
            size -= length
            yield await task
    for task, _ in tasks:
        yield await task


async def _answer(line: bytes, app: ASGIApp) -> bytes:
    """Whatever is wrong with a line is its answer."""
    number = uuid.uuid4().hex
    response: dict[str, Any] = {"status_code": 400, "request_id": number}
    try:
        request = Line.model_validate(json.loads(line))
        if request.body.get("stream"):
            raise ApiError(400, "The answers of a batch are not streamed.", param="body.stream")
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": request.url, "query_string": b""}
        scope |= {"headers": HEADERS, "state": {"request_id": number, "salt": None}}
        start, *parts = [one async for one in messages_of(app, scope, json.dumps(request.body).encode())]
        response |= {"status_code": start["status"], "body": json.loads(b"".join(one["body"] for one in parts))}
    except (ApiError, ValidationError) as error:
        response["body"] = (error if isinstance(error, ApiError) else from_validation(error.errors())).body()
    except (ValueError, RecursionError):
        response["body"] = ApiError(400, UNREADABLE).body()
    fields = {"id": f"batch_req_{number}", "custom_id": custom_id(line), "response": response, "error": None}
    return json.dumps(fields).encode() + b"\n"
