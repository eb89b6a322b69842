"""What every request passes: its id, host, key and size are checked on the way in, and it is logged on the way out."""

import hashlib
import logging
import re
import secrets
import time
import uuid
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.serving.errors import ApiError
from common.serving.metrics import ServerMetrics
from common.serving.options import ServerOptions

OPEN = ("/health",)  # paths that need no key, for a health check that has none
PROXIES = (b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip")
ADMIN = ("/metrics", "/trace")  # they show what all keys did, such as hits in the prefix cache
CLIENT_GONE = 499  # nginx's status for a client that left before it was answered; only in the log
LONGEST_PATH = 200  # characters of it in the log
WATCHED = ("/health", "/metrics")  # polled every few seconds: not logged
log = logging.getLogger("folovllm.serving")


class Gate:
    """The outermost ASGI layer. Leaves `request_id` and `salt` in the request's state."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: ServerMetrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in options.api_keys]
        self._admin = None if options.admin_key is None else options.admin_key.encode()
        here = options.loopback and not options.api_keys  # then other names are refused, which blocks DNS rebinding
        self._hosts = {"127.0.0.1", "localhost", "[::1]", options.host.lower()} if here else None
        self._max_body = options.max_body
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = uuid.uuid4().hex
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = state.get("ended_with", message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            state["salt"] = self._enter(scope)
            await self._app(scope, self._limited(receive, state), send_on)
        except ApiError as error:
            await error.response()(scope, receive, send_on)
        except Exception:  # the client has had its 500
            log.exception("defect", extra={"fields": {"request_id": request_id}})
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.responded(route, status)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:LONGEST_PATH],
            "status": status or None,  # None: the client left before the answer began
            "seconds": round(time.perf_counter() - started, 6),
        }
        log.log(logging.DEBUG if scope["path"] in WATCHED else logging.INFO, "response", extra={"fields": fields})

    def _enter(self, scope: Scope) -> str | None:
        """The cache salt of a request that may enter; raises `ApiError` for the others."""
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        lengths = [value for name, value in headers if name == b"content-length"]
        if lengths and any(name == b"transfer-encoding" for name, _ in headers):  # proxies may believe the other one
            message = "A body has either a Content-Length or a Transfer-Encoding."
            raise ApiError(400, message, code="invalid_http", headers={"Connection": "close"})
        if lengths and int(lengths[0]) > self._max_body:
            raise self._too_large()
        if self._hosts is not None:
            host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
            if re.sub(r":\d*$", "", host).lower() not in self._hosts:
                message = "This server answers to localhost only. --api-key opens it to other names."
                raise ApiError(400, message, code="host_not_allowed")
        admin = scope["path"] in ADMIN
        keys = [self._admin] if admin and self._admin is not None else self._keys
        if not keys or scope["path"] in OPEN:
            return None
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        known = [secrets.compare_digest(key.strip(), one) for one in keys]  # all of them, in constant time
        if scheme.lower() != b"bearer" or not any(known):
            said = "Incorrect API key provided." if given else "You did not provide an API key."
            message = f"{said} Send it as a header: Authorization: Bearer YOUR_KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if admin and self._admin is None and not _is_here(scope):
            message = f"{scope['path']} shows what all keys did: use the --admin-key, or ask from the server's machine."
            raise ApiError(403, message, code="admin_only")
        return salt_of(key.strip())

    def _limited(self, receive: Receive, state: dict[str, Any]) -> Receive:
        """A body without a stated length is counted as it comes. `ended_with`: the status of a client that has gone,
        by itself, or because it was too slow."""
        size = 0

        async def receive_on() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.disconnect":
                state.setdefault("ended_with", CLIENT_GONE)
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            return message

        return receive_on

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body of the request is over {self._max_body} bytes.", code="body_too_large")


def _is_here(scope: Scope) -> bool:
    """Does the client run on this machine, and is not a proxy that says so?"""
    proxy = any(name in PROXIES or name.startswith(b"x-forwarded-") for name, _ in scope["headers"])
    return not proxy and ip_address(scope["client"][0].partition("%")[0]).is_loopback


def salt_of(key: bytes) -> str:
    """Prompts of two keys never share cached blocks; the key itself is not passed on."""
    return hashlib.sha256(b"folovllm cache salt:" + key).hexdigest()
