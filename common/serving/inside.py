"""An application asked from inside this process, without a socket: by a replica, and by a batch."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message


async def messages(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """ASGI messages of the answer. To stop reading early is to leave, which aborts the request."""
    answer: asyncio.Queue[Message] = asyncio.Queue()
    request: list[Message] = [{"type": "http.request", "body": body}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if not request:
            await gone.wait()
        return request.pop() if request else {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, answer.put))  # pyright: ignore[reportArgumentType]
    task.add_done_callback(lambda _: answer.put_nowait({"type": "end"}))
    try:
        while (message := await answer.get())["type"] != "end":
            yield message
        await task
    finally:
        gone.set()


async def whole(app: ASGIApp, scope: dict[str, Any], body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    start, *parts = [message async for message in messages(app, scope, body)]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return start["status"], headers, b"".join(part["body"] for part in parts)
