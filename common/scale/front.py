"""What Serve's HTTP proxy calls: reads a request, has a replica chosen for it, and passes the answer on."""

# pyright: reportMissingImports=false
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException

from common.scale.prefixes import Call, call_of
from common.serving import errors
from common.serving.errors import ApiError
from common.serving.formats import as_event
from common.serving.metrics import one_page
from common.serving.options import ServerOptions

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # a replica refuses those that it does not know
OF_ALL = ("/health", "/metrics")  # asked of all replicas
WITHIN = 5.0  # seconds in which they have to answer


class Front:
    """engines: Serve's handle of the replicas."""

    def __init__(self, engines: Any, server: dict[str, Any]) -> None:
        self._engines, self._options = engines, ServerOptions(**server)
        self._answers = engines.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        errors.install(app)
        app.add_route("/{path:path}", self._respond, METHODS)
        return app

    async def drain(self, seconds: float) -> None:
        """As `Replica.drain`, of all of them."""
        await self._engines.broadcast("drain", seconds).results_async(return_exceptions=True)

    async def _respond(self, request: Request) -> Response:
        """A body that is too large is cut behind its limit: a replica then refuses it."""
        body = b""
        try:
            async with asyncio.timeout(self._options.body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > self._options.max_body:
                        break
        except TimeoutError:
            raise ApiError(408, "The request did not come in time.", code="request_timeout") from None
        call = call_of(request.scope, body)
        try:
            return await (self._of_all(call) if call.scope["path"] in OF_ALL else self._of_one(call))
        except (RayActorError, RayServeException, TimeoutError) as error:
            raise _as_api_error(error) from None

    async def _of_one(self, call: Call) -> Response:
        """The head waits for the first part of the body: until then an error has a status of its own."""
        messages = self._answers.remote(call)
        start, first = await anext(messages), await anext(messages)
        response = StreamingResponse(_body(first, messages), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _of_all(self, call: Call) -> Response:
        """What each replica tells: the least of their statuses, and those that answered with it."""
        asked = self._engines.broadcast("answer_whole", call)
        found = await asked.results_async(timeout_s=WITHIN, return_exceptions=True)
        replies = [one for one in found if not isinstance(one, Exception)]
        least = min((status for _, status, _ in replies), default=503)
        pages = {name: body.decode() for name, status, body in replies if status == least}
        if call.scope["path"] == "/metrics" and least == 200:
            return Response(one_page(pages), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        facts: dict[str, Any] = json.loads(next(iter(pages.values()), "") or "{}")
        return JSONResponse({**facts, "replicas": len(pages)}, least)


async def _body(message: dict[str, Any], messages: Any) -> AsyncIterator[bytes]:
    """A replica that ends in the middle is an event, too, without `[DONE]`. A client that leaves ends its request."""
    try:
        yield message["body"]
        async for message in messages:
            yield message["body"]
    except (RayActorError, RayServeException) as error:
        yield as_event(_as_api_error(error).body())
    finally:
        messages.cancel()


def _as_api_error(error: Exception) -> ApiError:
    status, text, code = 503, "No replica is available. Try again in a moment.", "no_replica"
    if isinstance(error, BackPressureError):
        status, text, code = 429, "The queue is full. Try again in a moment.", "rate_limit_exceeded"
    elif isinstance(error, RayActorError):
        text, code = "The replica that computed this answer has ended. Send the request again.", "replica_died"
    return ApiError(status, text, code=code, headers={"Retry-After": "1"})
