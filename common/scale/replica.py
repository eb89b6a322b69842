"""One engine behind the server's application: what Serve starts several of."""

# pyright: reportMissingImports=false
import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from typing import Any

from starlette.types import Message

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.execution.cores import in_own_thread
from common.scale.call import Call, Reply, reply
from common.scale.cluster import builder
from common.serving import logs
from common.serving.app import create_app
from common.serving.gate import Gate
from common.serving.inside import messages
from common.serving.options import ServerOptions
from common.serving.service import Service

OWN_ID = b"x-replica-request-id"  # the one in the replica's log and in the answer


class Replica:
    """build: where the stage's function is, `stages.m6_prefix_caching.engine:build`. engine, server: options.

    Its public methods are called through Serve's handles.
    """

    async def __init__(self, build: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:
        from ray import serve

        logs.set_up()
        make, config = builder(build), EngineConfig(**engine)
        self._stack = ExitStack()
        built = in_own_thread(lambda: self._stack.enter_context(ready_engine(make, config)))
        self._service = Service(built, ServerOptions(**server))
        self._app = Gate(create_app(self._service), self._service.options, self._service.metrics)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._service.thread.start(asyncio.get_running_loop())

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """ASGI messages. Serve cancels it when the client has left; and its proxy adds an x-request-id of its own."""
        async for message in messages(self._app, dict(call.scope), call.body):
            if message["type"] == "http.response.start":
                headers = [(OWN_ID if name == b"x-request-id" else name, value) for name, value in message["headers"]]
                message["headers"] = [*headers, (b"x-replica", self._name.encode())]
            yield message

    async def answer_whole(self, call: Call) -> Reply:
        """For what is asked of all replicas."""
        return await reply(self._app, call, self._name)

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
        """Serve calls and awaits it when the replica ends."""
        if hasattr(self, "_service"):
            await asyncio.to_thread(self._service.thread.stop)
        self._stack.close()
