"""What Serve's HTTP proxy calls: reads a request, has a replica chosen for it, and passes the answer on."""

# pyright: reportMissingImports=false
import asyncio
import contextlib
import json
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from common.scale.call import Call, Reply, call_of
from common.scale.pages import one_page, one_trace
from common.serving.errors import ApiError
from common.serving.formats import as_event
from common.serving.options import ServerOptions

OF_ALL = ("/health", "/metrics", "/trace")  # asked of all replicas
WITHIN = 5.0  # seconds in which each of them has to answer


class Front:
    """engines: Serve's handle of the replicas."""

    def __init__(self, engines: Any, server: dict[str, Any]) -> None:
        self._engines, self._options = engines, ServerOptions(**server)
        self._answers = engines.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn knows a function, but no method
            await self.respond(scope, receive, send)

        return app

    async def drain(self, seconds: float) -> None:
        """As `Replica.drain`, of all of them."""
        await self._engines.broadcast("drain", seconds).results_async(return_exceptions=True)

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            call = call_of(scope, await self._body(receive))
            if scope["path"] in OF_ALL:
                await (await self._of_all(call))(scope, receive, send_on)
            else:
                await self._of_one(call, send_on)
        except ApiError as error:
            if begun:  # a stream, without its [DONE]
                await send({"type": "http.response.body", "body": as_event(error.body()), "more_body": False})
            else:
                await error.response()(scope, receive, send)
        except ConnectionError:  # the client has left
            return

    async def _body(self, receive: Receive) -> bytes:
        """One that is too large is cut behind its limit: a replica then refuses it."""
        body = b""
        try:
            async with asyncio.timeout(self._options.body_timeout):
                while len(body) <= self._options.max_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "The request did not come in time.", code="request_timeout") from None
        return body

    async def _of_one(self, call: Call, send: Send) -> None:
        """The head waits for the first part of the body: until then an error has a status of its own."""
        head: list[Message] = []
        try:
            async for message in self._answers.remote(call):
                if message["type"] == "http.response.start":
                    head = [message]
                    continue
                for waiting in head:
                    await send(waiting)
                head = []
                await send(message)
        except BackPressureError:
            message = "The queue is full. Try again in a moment."
            headers = {"Retry-After": "1"}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers) from None
        except RayActorError:
            message = "The replica that computed this answer has ended. Send the request again."
            raise ApiError(503, message, code="replica_died", headers={"Retry-After": "1"}) from None
        except (DeploymentUnavailableError, RayServeException):
            message = "No replica is available. Try again in a moment."
            raise ApiError(503, message, code="no_replica", headers={"Retry-After": "5"}) from None

    async def _of_all(self, call: Call) -> Response:
        """Without those that do not answer in time."""
        found: list[Any] = []
        with contextlib.suppress(TimeoutError):
            asked = self._engines.broadcast("answer_whole", call)
            found = await asked.results_async(timeout_s=WITHIN, return_exceptions=True)
        replies = sorted((one for one in found if isinstance(one, Reply)), key=lambda one: (one.status, one.replica))
        if not replies:
            return JSONResponse({"status": "failing", "replicas": 0}, 503)
        best = [one for one in replies if one.status == replies[0].status]
        first, headers = best[0], {name.decode(): value.decode() for name, value in best[0].headers}
        headers.pop("content-length", None)
        body = first.body
        if first.status == 200 and call.scope["path"] == "/metrics":
            body = one_page({one.replica: one.body.decode() for one in best})
        elif first.status == 200 and call.scope["path"] == "/trace":
            body = one_trace({one.replica: one.body for one in best})
        elif body and "status" in (facts := json.loads(body)):
            body = json.dumps({**facts, "replicas": len(best)}).encode()
        return Response(body, first.status, headers)


async def _live(receive: Receive, send: Send) -> None:
    for part in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{part}.complete"})
