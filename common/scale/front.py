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
from starlette.routing import request_response
from starlette.types import Message, Scope

from common.scale.prefixes import keys_of
from common.serving.errors import ApiError, install
from common.serving.formats import as_event
from common.serving.metrics import one_page
from common.serving.options import ServerOptions

PASSED_ON = ("type", "method", "path", "query_string", "headers", "client")


class Front:
    """engines: Serve's handle of the replicas."""

    def __init__(self, engines: Any, server: dict[str, Any]) -> None:
        self._engines, self._options = engines, ServerOptions(**server)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        install(app)
        app.mount("/", request_response(self._respond))
        return app

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
        scope = {name: request.scope[name] for name in PASSED_ON}
        try:
            of_all = scope["path"] in ("/health", "/metrics")
            return await (self._of_all(scope) if of_all else self._of_one(scope, body))
        except (RayActorError, RayServeException, TimeoutError) as error:
            raise _as_api_error(error) from None

    async def _of_one(self, scope: Scope, body: bytes) -> Response:
        """The head waits for the first part of the body: until then an error has a status of its own."""
        ask = self._engines.options(method_name="answer", stream=True).remote
        messages = ask(scope, body, keys=keys_of(scope["headers"], body))
        start, first = await anext(messages), await anext(messages)
        response = StreamingResponse(_body(first, messages), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _of_all(self, scope: Scope) -> Response:
        """Of those with the least status; /health also says of how many."""
        asked = self._engines.broadcast("whole", scope)
        found = await asked.results_async(timeout_s=5, return_exceptions=True)
        replies = [one for one in found if not isinstance(one, Exception)]
        least = min((status for _, status, _ in replies), default=503)
        pages = {name: page for name, status, page in replies if status == least}
        if least == 200 and scope["path"] == "/metrics":
            return Response(one_page(pages), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        facts: dict[str, Any] = json.loads(next(iter(pages.values()), "") or "{}")
        return JSONResponse(facts if "error" in facts else {**facts, "replicas": len(pages)}, least)


async def _body(message: Message, messages: Any) -> AsyncIterator[bytes]:
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
