"""From options to a server that runs until a signal ends it."""

import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from common.engine import Engine
from common.serving import logs
from common.serving.app import create_app
from common.serving.gate import Gate
from common.serving.listener import address
from common.serving.options import ServerOptions
from common.serving.service import Service
from common.serving.spans import Spans

GRACE = 5  # seconds between the end of the drain, when every client has an answer, and the closing of connections


def run(engine: Engine, options: ServerOptions, listener: socket.socket, spans: Spans | None) -> None:
    """Serve until SIGTERM or Ctrl-C, then let open requests finish."""
    logs.set_up()
    server = Server(Service(engine, options, spans))
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it is done
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)


class Server(uvicorn.Server):
    """On a signal, uvicorn stops listening and waits for open requests. This one drains first: /health reports it."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self.service = service
        self._signal: int | None = None
        app = Gate(create_app(service), options, service.metrics)
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "ws": "none", "server_header": False}
        super().__init__(uvicorn.Config(app, **quiet, timeout_graceful_shutdown=GRACE))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends the wait."""
        self.service.drain(self.service.options.drain if self._signal is None else 0.0)
        self._signal = sig

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second, to learn whether to exit."""
        if self._signal is not None and self.service.drained:
            super().handle_exit(self._signal, None)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            url = address(sockets[0])
            print(f"{self.service.model_name} on {self.service.engine.stage}: {url}/v1 (Ctrl-C ends it)", flush=True)
            if not self.service.options.api_keys and not self.service.options.loopback:
                print("warning: any client that reaches it can use it; --api-key asks for a key", file=sys.stderr)
