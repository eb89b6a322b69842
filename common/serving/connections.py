"""What uvicorn lacks: limits on connections, and on the time that each may wait for its client. Of the servers that we
tried instead, hypercorn and granian limit the time of headers only, and answer no /health while they drain."""

import contextlib
import json
import os
import struct
import time
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from common.serving.errors import ApiError
from common.serving.options import ServerOptions

BACKLOG = 16  # connections that asyncio accepts at once; it hands them on about five rounds later
SPARE = 64 + 5 * BACKLOG  # file descriptors for all else
AT_ONCE = 1 << 14  # bytes taken from a client before the others have their turn; asyncio would take 16 times as many
PIPELINED = 1 << 16  # bytes of next requests that are read while one is answered
UNTAKEN = 0x5411  # Linux' SIOCOUTQ: the bytes of a socket that the client's machine has not taken
LISTING = 20  # a look through all connections that finds none to replace is not repeated for so many times as long


class Connections:
    """Those of one server. `sweep` ends the ones that have waited too long."""

    def __init__(self, options: ServerOptions) -> None:
        self.most = _within_descriptors(options.max_connections)
        self.open: set[Connection] = set()
        self.limits = {"headers": options.header_timeout, "body": options.body_timeout}
        self.limits |= {"next": options.keep_alive, "read": options.read_timeout}
        self._waiting: list[tuple[float, Connection]] = []  # since when, and who; the longest wait last
        self._list_again = 0.0

    def sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self.open):
            connection.check(now)

    def make_room(self) -> bool:
        """When all places are taken, a client that keeps us waiting loses its own, the longest wait first: one that has
        asked nothing, or else one that sends no body or reads no answer."""
        now = time.monotonic()
        while self._waiting or now > self._list_again:
            if self._waiting:
                since, connection = self._waiting.pop()
                if connection.since == since and connection.keeps_waiting:
                    connection.transport.abort()
                    self.open.discard(connection)
                    return True
            else:
                self.sweep()
                waiting = [c for c in self.open if c.keeps_waiting]
                listed = [c for c in waiting if c.waits_for in ("headers", "next")] or waiting
                self._waiting = sorted(((c.since, c) for c in listed), key=lambda entry: -entry[0])
                if not listed:
                    self._list_again = now + LISTING * (time.monotonic() - now)
                    return False
        return False


class Connection(H11Protocol):
    """uvicorn's, which knows what its client has to do next, and since when."""

    def __init__(self, others: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._others = others
        self._state: tuple[object, ...] = ()
        self.since = time.monotonic()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = AT_ONCE
        if len(self._others.open) >= self._others.most and not self._others.make_room():
            self._refuse(ApiError(503, "Too many connections.", code="too_many_connections"))
        else:
            self._others.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """uvicorn stops reading behind a request that waits for its answer; only who reads sees the client leave."""
        super().data_received(data)
        if 0 < len(self.conn.trailing_data[0]) < PIPELINED:
            self.flow.resume_reading()

    @property
    def waits_for(self) -> str | None:
        """None: it is the server's turn."""
        if self.transport.is_closing() or self.flow.write_paused:
            return "read"  # what has been sent
        if not self.cycle:  # pyright: ignore[reportUnnecessaryComparison]
            return "headers"
        if self.cycle.more_body:  # also behind an answer that did not need all of it
            return "body"
        begun = "headers" if self.conn.trailing_data[0] else "next"
        return begun if self.cycle.response_complete else None

    @property
    def keeps_waiting(self) -> bool:
        return self.waits_for is not None and not self.transport.is_closing()

    def check(self, now: float) -> None:
        waits_for = self.waits_for
        state = (waits_for, self.cycle, *(self._untaken() if waits_for == "read" else ()))
        if state != self._state:
            self._state, self.since = state, now
        elif waits_for is not None and now - self.since > self._others.limits[waits_for]:
            if waits_for == "read":
                self.transport.abort()
            elif self.conn.trailing_data[0] or (waits_for == "body" and not self.cycle.response_started):
                self._refuse(ApiError(408, "The request did not come in time.", code="request_timeout"))
            else:
                self.transport.close()

    def _untaken(self) -> tuple[int, ...]:
        """Bytes of the answer on their way, here and, where the kernel tells, in its buffer: both shrink while a client
        reads, however slowly."""
        taken = [self.transport.get_write_buffer_size()]
        with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
            from fcntl import ioctl

            taken += struct.unpack("i", ioctl(self.transport.get_extra_info("socket").fileno(), UNTAKEN, bytes(4)))
        return tuple(taken)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body())
        status = f"{error.status_code} {HTTPStatus(error.status_code).phrase}"
        headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
        self.transport.write(f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n{body}".encode())
        self.transport.close()
        if self.cycle and not self.cycle.response_started:  # its answer; the app hears that the client has gone
            self.cycle.scope.setdefault("state", {})["ended_with"] = error.status_code
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def _within_descriptors(wanted: int) -> int:
    """How many connections the limit of open files allows; its soft part is raised as far as they need."""
    try:
        import resource
    except ImportError:  # Windows: sockets are no files there
        return wanted
    others = len(os.listdir("/dev/fd")) + SPARE
    soft, hard = (2**31 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted + others:
        soft = min(wanted + others, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(wanted, soft - others))
