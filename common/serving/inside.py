"""An application asked from inside this process, without a socket: by a replica, and by a batch."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message


async def messages(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """ASGI messages of the answer. To stop reading early is to leave, which aborts the request."""
    answer: asyncio.Queue[Message | None] = asyncio.Queue()
    request: list[Message] = [{"type": "http.request", "body": body}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if not request:
            await gone.wait()
        return request.pop() if request else {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, answer.put))  # pyright: ignore[reportArgumentType]
    task.add_done_callback(lambda _: answer.put_nowait(None))  # what it raised after its 500 is logged
    try:
        while message := await answer.get():
            yield message
    finally:
        gone.set()


async def whole(app: ASGIApp, scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
    """Status and body."""
    start, *parts = [message async for message in messages(app, scope, body)]
    return start["status"], b"".join(part["body"] for part in parts)
