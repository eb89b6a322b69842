"""What Serve's HTTP proxy calls: reads a request, has a replica chosen for it, and passes the answer on."""

# pyright: reportMissingImports=false
import asyncio
import contextlib
import json
from typing import Any

from fastapi import FastAPI, Request, Response
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from common.scale.prefixes import Call, call_of
from common.serving import errors
from common.serving.errors import ApiError
from common.serving.formats import as_event
from common.serving.metrics import one_page
from common.serving.options import ServerOptions

OF_ALL = ("/health", "/metrics")  # asked of all replicas
WITHIN = 5.0  # seconds in which each of them has to answer


class Front:
    """engines: Serve's handle of the replicas."""

    def __init__(self, engines: Any, server: dict[str, Any]) -> None:
        self._engines, self._options = engines, ServerOptions(**server)
        self._answers = engines.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        errors.install(app)
        app.mount("/", self._respond)
        return app

    async def drain(self, seconds: float) -> None:
        """As `Replica.drain`, of all of them."""
        await self._engines.broadcast("drain", seconds).results_async(return_exceptions=True)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application. A body that is too large is cut behind its limit: a replica then refuses it."""
        body = b""
        try:
            async with asyncio.timeout(self._options.body_timeout):
                async for part in Request(scope, receive).stream():
                    body += part
                    if len(body) > self._options.max_body:
                        break
        except TimeoutError:
            raise ApiError(408, "The request did not come in time.", code="request_timeout") from None
        except ClientDisconnect:
            return
        call = call_of(scope, body)
        if scope["path"] in OF_ALL:
            await (await self._of_all(call))(scope, receive, send)
        else:
            await self._of_one(call, send)

    async def _of_one(self, call: Call, send: Send) -> None:
        """The head waits for the first part of the body: until then an error has a status of its own."""
        waiting: list[Message] = []
        begun = False
        try:
            async for message in self._answers.remote(call):
                waiting.append(message)
                if message["type"] == "http.response.body":
                    begun = True
                    for one in waiting:
                        await send(one)
                    waiting = []
        except (RayActorError, RayServeException) as error:
            found = _as_api_error(error)
            if not begun:
                raise found from None
            await send({"type": "http.response.body", "body": as_event(found.body())})  # a stream, without its [DONE]

    async def _of_all(self, call: Call) -> Response:
        """Without those that do not answer in time."""
        found: list[Any] = []
        with contextlib.suppress(TimeoutError):
            asked = self._engines.broadcast("answer_whole", call)
            found = await asked.results_async(timeout_s=WITHIN, return_exceptions=True)
        best = min((one[1] for one in found if isinstance(one, tuple)), default=503)
        replies = {one[0]: one[2:] for one in found if isinstance(one, tuple) and one[1] == best}
        headers, body = next(iter(replies.values()), ({"content-type": "application/json"}, b'{"status":"failing"}'))
        if best == 200 and call.scope["path"] == "/metrics":
            body = one_page({name: page.decode() for name, (_, page) in replies.items()}).encode()
        elif b'"status"' in body:
            body = json.dumps({**json.loads(body), "replicas": len(replies)}).encode()
        return Response(body, best, {name: value for name, value in headers.items() if name != "content-length"})


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        text, code, later = "The queue is full. Try again in a moment.", "rate_limit_exceeded", "1"
        return ApiError(429, text, code=code, headers={"Retry-After": later})
    if isinstance(error, RayActorError):
        text, code = "The replica that computed this answer has ended. Send the request again.", "replica_died"
    else:
        text, code = "No replica is available. Try again in a moment.", "no_replica"
    return ApiError(503, text, code=code, headers={"Retry-After": "1"})
