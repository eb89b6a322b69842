"""One engine behind the server's application. Serve starts several, and calls the methods through its handles."""

# pyright: reportMissingImports=false
import asyncio
import importlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve
from starlette.types import Message

from common.cli.generate import loaded_engine
from common.config import EngineConfig
from common.scale.prefixes import Call
from common.serving import inside, logs
from common.serving.options import ServerOptions
from common.serving.server import guarded_app
from common.serving.service import Service


class Replica:
    """build: of the stage, as in `stages.m6_prefix_caching.engine:build`. engine, server: options."""

    async def __init__(self, build: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:
        logs.set_up()
        module, _, name = build.partition(":")
        self._loaded = loaded_engine(getattr(importlib.import_module(module), name), EngineConfig(**engine))
        self._service = Service(self._loaded.__enter__(), ServerOptions(**server))
        self._app = guarded_app(self._service)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._service.thread.start(asyncio.get_running_loop())

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """ASGI messages. Serve cancels it when the client has left, and its proxy adds a request id of its own."""
        async for message in inside.messages(self._app, dict(call.scope), call.body):
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                message["headers"] = [*headers, (b"x-replica", self._name.encode())]
            yield message

    async def answer_whole(self, call: Call) -> tuple[str, int, bytes]:
        """Its own name, and the answer; for what is asked of all replicas."""
        return self._name, *await inside.whole(self._app, dict(call.scope), call.body)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; returns when the open ones have ended, after `seconds` at the latest by an error."""
        self._service.drain(seconds)
        while not self._service.drained:
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises three times in a row."""
        if not self._service.thread.healthy:
            raise RuntimeError("steps keep failing")
