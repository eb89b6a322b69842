"""From options to a server that runs until a signal ends it."""

from __future__ import annotations

import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from common.engine import Engine
from common.errors import UserError
from common.serving import logs
from common.serving.app import create_app
from common.serving.gate import Gate
from common.serving.options import ServerOptions
from common.serving.service import Service
from common.serving.spans import Spans, provider_for

GRACE = 5.0
"""Seconds between the end of the drain, when everybody has been told, and the cutting of connections."""


def listen(options: ServerOptions) -> socket.socket:
    """A bound socket, so that a port in use is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise UserError(f"cannot listen on {options.host}:{options.port}: {error}. Choose another --port") from None
    return listener


def address(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(engine: Engine, options: ServerOptions, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then let the requests that are there finish."""
    provider: Any = provider_for(options.spans) if options.spans else None
    logs.set_up()
    service = Service(engine, options, Spans(provider) if provider else None)
    server = Server(service)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it is done
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
        if provider is not None:
            provider.shutdown()


class Server(uvicorn.Server):
    """uvicorn, which on a signal closes the door and waits for those inside; here they are told how long."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self.service = service
        super().__init__(
            uvicorn.Config(
                Gate(create_app(service), options, service.metrics),
                log_config=None,
                access_log=False,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(options.drain + GRACE),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain. A second Ctrl-C: at once."""
        if not self.service.draining:
            self.service.drain()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            url = address(sockets[0])
            print(f"{self.service.model_name} on {self.service.engine.stage}: {url}/v1 (Ctrl-C ends it)", flush=True)
            if not self.service.options.api_keys and sockets[0].getsockname()[0] not in ("127.0.0.1", "::1"):
                print("warning: whoever reaches this machine can use it; --api-key asks for a key", file=sys.stderr)
