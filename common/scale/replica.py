"""One engine behind the server's application. Serve starts several, and calls the methods through its handles."""

# pyright: reportMissingImports=false
import asyncio
import importlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from typing import Any

from ray import serve
from starlette.types import Message

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.execution.cores import in_own_thread
from common.scale.prefixes import Call
from common.serving import inside, logs
from common.serving.app import create_app
from common.serving.gate import Gate
from common.serving.options import ServerOptions
from common.serving.service import Service

OWN_ID = b"x-replica-request-id"  # the one in the log and in the answer, beside the one of Serve's proxy


class Replica:
    """build: of the stage, as in `stages.m6_prefix_caching.engine:build`. engine, server: options."""

    async def __init__(self, build: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:
        logs.set_up()
        module, _, name = build.partition(":")
        make, config, self._stack = getattr(importlib.import_module(module), name), EngineConfig(**engine), ExitStack()
        built = in_own_thread(lambda: self._stack.enter_context(ready_engine(make, config)))
        self._service = Service(built, ServerOptions(**server))
        self._app = Gate(create_app(self._service), self._service.options, self._service.metrics)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._service.thread.start(asyncio.get_running_loop())

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """ASGI messages. Serve cancels it when the client has left."""
        async for message in inside.messages(self._app, dict(call.scope), call.body):
            if message["type"] == "http.response.start":
                headers = [(OWN_ID if name == b"x-request-id" else name, value) for name, value in message["headers"]]
                message["headers"] = [*headers, (b"x-replica", self._name.encode())]
            yield message

    async def answer_whole(self, call: Call) -> tuple[str, int, dict[str, str], bytes]:
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

    async def __del__(self) -> None:
        """Serve awaits it when the replica ends."""
        await asyncio.to_thread(self._service.thread.stop)
        self._stack.close()
