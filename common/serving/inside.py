"""An application asked from inside this process, without a socket: by a replica, and by a batch."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message


async def messages(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """ASGI messages with which the app answers. To stop reading early is to leave, which aborts the request."""
    answer: asyncio.Queue[Message | None] = asyncio.Queue()
    request = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if request:
            return request.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, answer.put)
        finally:
            answer.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await answer.get()) is not None:
            yield message
        await task
    finally:
        gone.set()


async def whole(app: ASGIApp, scope: dict[str, Any], body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of an answer."""
    status, headers, parts = 500, list[tuple[bytes, bytes]](), list[bytes]()
    async for message in messages(app, scope, body):
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        parts.append(message.get("body", b""))
    return status, headers, b"".join(parts)
