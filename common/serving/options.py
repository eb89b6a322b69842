"""Where the server listens, which clients it answers, and how much one request may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import ip_address

from common.errors import refuse_unknown_options, require

SPAN_EXPORTERS = ("console", "otlp")


@refuse_unknown_options
@dataclass(frozen=True)
class ServerOptions:
    """Options of the server; impossible values raise `UserError`.

    host, port: where it listens; port 0 takes a free one. On loopback and without keys, only requests to that host or
        to localhost are answered, which blocks DNS rebinding.
    api_keys: requests need one of them; without any, all clients are answered.
    served_name: the model's name for clients; None takes its own.
    max_queue: most answers that wait, next to the `max_num_seqs` that run; further requests get 429.
    max_body: most bytes of a request's body.
    max_prompt_tokens: most tokens of a prompt; None: as many as `max_model_len` leaves room for.
    max_n: most answers to one request: prompts × n.
    max_tokens: most tokens of one answer; None: as many as `max_model_len` leaves room for.
    drain: seconds that open requests have after SIGTERM or Ctrl-C.
    spans: `console` or `otlp`: OpenTelemetry spans of each request; None: none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_name: str | None = None
    max_queue: int = 256
    max_body: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_tokens: int | None = None
    drain: float = 30.0
    spans: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.host), "host must not be empty: 127.0.0.1 is this machine alone, 0.0.0.0 is everywhere")
        require(0 <= self.port < 65536, f"port must be in 0 ... 65535, not {self.port}")
        require(all(self.api_keys), "an API key must not be empty")
        require(all(key.isascii() and key.isprintable() for key in self.api_keys), "an API key is printable ASCII text")
        require(self.max_queue >= 0, f"max_queue must be 0 or more, not {self.max_queue}")
        for name in ("max_body", "max_prompt_tokens", "max_n", "max_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        require(0 <= self.drain < math.inf, f"drain must be 0 seconds or more, and not endless: {self.drain}")
        require(
            self.spans is None or self.spans in SPAN_EXPORTERS,
            f"unknown spans {self.spans!r}. Choose from: {', '.join(SPAN_EXPORTERS)}",
        )

    @property
    def loopback(self) -> bool:
        """Does it listen on this machine alone?"""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
