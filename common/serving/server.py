"""From options to a server that runs until a signal ends it."""

import atexit
import logging
import os
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from common.engine import Engine
from common.errors import UserError
from common.serving import logs
from common.serving.app import create_app
from common.serving.connections import BACKLOG, Connection, Connections
from common.serving.gate import Gate
from common.serving.listener import address
from common.serving.options import ServerOptions
from common.serving.service import Service
from common.serving.spans import Spans

log = logging.getLogger("folovllm.serving")
QUEUE = 1024  # connections that the kernel holds until they are taken
GRACE = 5  # seconds between the end of the drain, when every client has an answer, and the closing of connections


def run(engine: Engine, options: ServerOptions, listener: socket.socket, spans: Spans | None) -> None:
    """Serve until SIGTERM or Ctrl-C, then let open requests finish."""
    log_writer = logs.set_up()
    atexit.register(log_writer.flushed)  # such as of spans that were lost at the very end
    server = Server(Service(engine, options, spans))
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it is done
    try:
        server.run(sockets=[listener])
        if engine.config.ranks and engine.config.ranks.lost:
            raise UserError(engine.config.ranks.lost)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if not log_writer.flushed():
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what comes now must not wait for its reader either)


class Server(uvicorn.Server):
    """On a signal, uvicorn stops listening and waits for open requests. This one drains first: /health reports it."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self.service = service
        self._signal: int | None = None
        self.connections = Connections(options)
        service.metrics.watch(self.connections.open)
        app: ASGIApp = Gate(create_app(service), options, service.metrics)
        if options.allow_origin:  # keys travel in a header, so pages need no credentials of a browser
            methods, seen = ("GET", "HEAD", "POST"), ("X-Request-Id", "Retry-After")
            app = CORSMiddleware(app, options.allow_origin, methods, allow_headers=("*",), expose_headers=seen)
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "ws": "none", "server_header": False}
        quiet["loop"] = "asyncio"  # whose transports `Connection` sets
        http: dict[str, Any] = {"http": partial(Connection, self.connections), "timeout_keep_alive": options.keep_alive}
        super().__init__(uvicorn.Config(app, **quiet, **http, backlog=BACKLOG, timeout_graceful_shutdown=GRACE))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends the wait."""
        self.service.drain(self.service.options.drain if self._signal is None else 0.0)
        self._signal = sig

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second, to learn whether to exit."""
        ranks = self.service.engine.config.ranks
        if self._signal is None and ranks and ranks.lost:
            self.handle_exit(signal.SIGTERM, None)
        if self._signal is not None and self.service.drained:
            super().handle_exit(self._signal, None)
        self.connections.sweep()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            sockets[0].listen(QUEUE)  # uvicorn's number is both: of those that wait, and of those taken at once
            options, url = self.service.options, address(sockets[0])
            logs.say(f"{self.service.model_name} on {self.service.engine.stage}: {url}/v1 (Ctrl-C ends it)")
            if self.connections.most < options.max_connections:
                log.warning("fewer connections, by ulimit -n", extra={"fields": {"most": self.connections.most}})
            if not options.api_keys and not options.loopback:
                log.warning("any client that reaches it can use it; --api-key asks for a key")
