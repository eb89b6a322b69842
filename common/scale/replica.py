"""One engine behind the server's application. Serve starts several, and calls the methods through its handles."""

# pyright: reportMissingImports=false
import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from ray import serve
from starlette.types import Message

from common.cli.generate import loaded_engine
from common.config import EngineConfig
from common.execution.parallel.start import on_ranks
from common.serving import logs
from common.serving.app import create_app, messages_of
from common.serving.gate import Gate
from common.serving.options import ServerOptions
from common.serving.service import Service


class Replica:
    """build: of the stage, as in `stages.m6_prefix_caching.engine:build`. engine, server: options."""

    async def __init__(self, build: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:
        logs.set_up()
        self._loaded = loaded_engine(on_ranks(resolve_name(build)), EngineConfig(**engine))
        self._service = Service(self._loaded.__enter__(), ServerOptions(**server))
        self._app = Gate(create_app(self._service), self._service.options, self._service.metrics)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._service.thread.start(asyncio.get_running_loop())

    async def answer(self, scope: dict[str, Any], body: bytes, keys: Sequence[bytes] = ()) -> AsyncGenerator[Message]:
        """ASGI messages, until Serve cancels it: the client has left. Its proxy adds an id. keys: for the router."""
        async for message in messages_of(self._app, scope, body):
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                message["headers"] = [*headers, (b"x-replica", self._name.encode())]
            yield message

    async def whole(self, scope: dict[str, Any]) -> tuple[str, int, str]:
        """Its name, and status and body of the answer to what is asked of all replicas."""
        start, *parts = [message async for message in messages_of(self._app, scope, b"")]
        return self._name, start["status"], b"".join(part["body"] for part in parts).decode()

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises three times in a row."""
        if not self._service.thread.healthy:
            raise RuntimeError("steps keep failing")
