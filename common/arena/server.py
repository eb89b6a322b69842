"""The page's server, which runs until a signal ends it."""

import socket
from collections.abc import Sequence
from typing import Any

import uvicorn

from common.arena.app import create_app
from common.arena.side import Side
from common.serving.listener import address


def server_of(sides: Sequence[Side]) -> uvicorn.Server:
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "ws": "none", "server_header": False}
    config = uvicorn.Config(create_app(sides), **quiet, timeout_graceful_shutdown=1)  # streams never end by themselves
    return uvicorn.Server(config)


def run(sides: Sequence[Side], listener: socket.socket) -> None:
    """Returns after SIGTERM; Ctrl-C raises `KeyboardInterrupt`."""
    names = " against ".join(side.stage for side in sides)
    print(f"{names}: open {address(listener)} in a browser (Ctrl-C ends it)", flush=True)
    server_of(sides).run(sockets=[listener])
