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

from common.engine import Engine
from common.serving.app import create_app
from common.serving.errors import ApiError, from_validation
from common.serving.inside import whole
from common.serving.options import ServerOptions
from common.serving.schema import Body
from common.serving.service import Service

BEGIN = b'{"id": "batch_req_'  # of an answer
LONGEST = 1 << 24  # bytes of a line; a longer one is cut, and then is no JSON
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
    line = _read_line(file) if begin else b""
    while file.tell() < end and (line := _read_line(file)):
        if line.strip():
            yield line


def _read_line(file: BinaryIO) -> bytes:
    line = rest = file.readline(LONGEST)
    while len(rest) == LONGEST and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST)
    return line


class Answerer:
    """An engine that answers lines by lines."""

    def __init__(self, engine: Engine, served_name: str | None) -> None:
        self._most = engine.scheduler.max_num_seqs
        own: dict[str, Any] = {"max_queue": 1 << 20, "max_n": self._most, "encode_timeout": 1e6}
        self._service = Service(engine, ServerOptions(served_name=served_name, **own))
        self._app, self._started = create_app(self._service), False

    async def all(self, lines: Iterable[bytes]) -> AsyncIterator[bytes]:
        """The answers, in the order of the lines, few of which are open at a time. Each call is on the same loop."""
        if not self._started:
            self._started = True
            self._service.thread.start(asyncio.get_running_loop())
        tasks: deque[tuple[asyncio.Task[bytes], int]] = deque()
        size = 0
        for line in lines:
            tasks.append((asyncio.create_task(self._one(line)), len(line)))
            size += len(line)
            while tasks and (len(tasks) >= AHEAD * self._most or size > OPEN_BYTES or tasks[0][0].done()):
                task, length = tasks.popleft()
                size -= length
                yield await task
        for task, _ in tasks:
            yield await task

    def stop(self) -> None:
        self._service.thread.stop()

    async def _one(self, line: bytes) -> bytes:
        """Whatever is wrong with a line is its answer."""
        request_id = uuid.uuid4().hex
        try:
            request = Line.model_validate_json(line)
            if request.body.get("stream"):
                raise ApiError(400, "The answers of a batch are not streamed.", param="body.stream")
            scope: dict[str, Any] = {"type": "http", "method": "POST", "path": request.url, "query_string": b""}
            scope["headers"] = [(b"content-type", b"application/json")]
            scope["state"] = {"request_id": request_id, "salt": None}
            status, answer = await whole(self._app, scope, json.dumps(request.body).encode())
        except (ApiError, ValidationError) as error:
            refused = error if isinstance(error, ApiError) else from_validation(error.errors())
            status, answer = refused.status_code, json.dumps(refused.body())
        response = {"status_code": status, "request_id": request_id, "body": json.loads(answer)}
        fields = {"id": f"batch_req_{request_id}", "custom_id": custom_id(line), "response": response, "error": None}
        return json.dumps(fields).encode() + b"\n"


def custom_id(line: bytes) -> str | None:
    """Of a line or of its answer; None where there is no text."""
    try:
        fields: Any = json.loads(line)
        return given if isinstance(given := fields.get("custom_id"), str) else None
    except (ValueError, AttributeError, RecursionError):
        return None
