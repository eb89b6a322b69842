"""From options to a page that is there until a signal ends it."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import uvicorn

from common.arena.app import create_app
from common.arena.side import Side
from common.serving.listener import address


class Server(uvicorn.Server):
    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides
        super().__init__(
            uvicorn.Config(
                create_app(sides),
                log_level="warning",
                access_log=False,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=1,  # streams of events never end by themselves
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            names = " against ".join(side.stage for side in self._sides)
            print(f"{names}: open {address(sockets[0])} in a browser (Ctrl-C ends it)", flush=True)


def run(sides: Sequence[Side], listener: socket.socket) -> None:
    """Returns after SIGTERM; Ctrl-C raises `KeyboardInterrupt`."""
    Server(sides).run(sockets=[listener])
