"""Where the server listens, which clients it answers, and the limits of a request."""

import math
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from common.errors import refuse_unknown_options, require, unknown

SPAN_EXPORTERS = ("console", "otlp")
TOOL_PARSERS = ("hermes", "llama3_json")


@refuse_unknown_options
@dataclass(frozen=True)
class ServerOptions:
    """Options of the server; impossible values raise `UserError`. The notes are the help texts of `serve`."""

    host: Annotated[str, "Address to listen on; 0.0.0.0 is everywhere."] = "127.0.0.1"
    port: Annotated[int, "0 takes a free one."] = 8000
    api_keys: tuple[str, ...] = ()  # requests need one of them; without any, all are answered
    admin_key: Annotated[str | None, "For /metrics and /trace; without it: on this machine only."] = None
    allow_origin: Annotated[tuple[str, ...], "Web page that may call it: http://localhost:3000; repeatable."] = ()
    served_name: Annotated[str | None, "The model's name for clients. Without it: its own."] = None
    max_queue: Annotated[int, "Most answers that wait, next to those that run; then 429."] = 256
    max_body: Annotated[int, "Most bytes of a request's body."] = 1 << 20
    max_prompt_tokens: Annotated[int | None, "Most tokens of a prompt. Without it: what --max-model-len allows."] = None
    max_n: Annotated[int, "Most answers to one request: prompts × n."] = 16
    max_tokens: Annotated[int | None, "Most tokens of one answer. Without it: what --max-model-len allows."] = None
    max_connections: Annotated[int, "Most open connections; silent ones make room for new ones."] = 1000
    header_timeout: Annotated[float, "Seconds that a request's headers may take."] = 10.0
    body_timeout: Annotated[float, "Seconds that its body may take."] = 30.0
    encode_timeout: Annotated[float, "Seconds that its prompt may wait and be encoded; then 503."] = 10.0
    read_timeout: Annotated[float, "Seconds that its client may read nothing of the answer."] = 30.0
    keep_alive: Annotated[float, "Seconds that a connection may wait for its next request."] = 30.0
    drain: Annotated[float, "Seconds that open requests have after SIGTERM or Ctrl-C."] = 30.0
    tool_parser: Annotated[str | None, "Format of calls: hermes or llama3_json. Without it: the template's."] = None
    spans: Annotated[str | None, "OpenTelemetry spans of each request: console, or otlp."] = None
    replicas: Annotated[int, "Engines behind one address, on Ray Serve."] = 1

    def __post_init__(self) -> None:
        require(bool(self.host), "host must not be empty: 127.0.0.1 is this machine alone, 0.0.0.0 is everywhere")
        require(0 <= self.port < 65536, f"port must be in 0 ... 65535, not {self.port}")
        keys = (*self.api_keys, self.admin_key or "none")
        require(all(self.api_keys) and self.admin_key != "", "an API key must not be empty")
        require(all(key.isascii() and key.isprintable() for key in keys), "an API key is printable ASCII text")
        require(self.max_queue >= 0, f"max_queue must be 0 or more, not {self.max_queue}")
        for origin in self.allow_origin:
            whole = origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin) is not None
            require(whole, f"allow_origin is scheme and host, such as http://localhost:3000, or *: not {origin}")
        closed = bool(self.api_keys) or not self.loopback
        require(closed or "*" not in self.allow_origin, "allow_origin * lets all web pages in: give an --api-key too")
        for name in ("header_timeout", "body_timeout", "encode_timeout", "read_timeout", "keep_alive"):
            require(0 < getattr(self, name) < math.inf, f"{name} must be more than 0 seconds, and not endless")
        for name in ("max_body", "max_prompt_tokens", "max_n", "max_tokens", "max_connections", "replicas"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        require(0 <= self.drain < math.inf, f"drain must be 0 seconds or more, and not endless: {self.drain}")
        if self.tool_parser not in (None, *TOOL_PARSERS):
            raise unknown("tool_parser", self.tool_parser, TOOL_PARSERS)
        if self.spans not in (None, *SPAN_EXPORTERS):
            raise unknown("spans", self.spans, SPAN_EXPORTERS)
        require(self.replicas == 1 or not (self.spans or self.allow_origin), "replicas: no spans, no allow_origin")

    @property
    def loopback(self) -> bool:
        """Does it listen on this machine alone?"""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
