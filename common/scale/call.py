"""A request on its way to a replica."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.serving.inside import whole

PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
             "headers", "client", "server")  # fmt: skip


@dataclass(frozen=True)
class Call:
    """prompt: the text by which it is routed, tools before messages as in templates; Ray's own prefix router looks for
    this name. salt: requests of two salts share nothing."""

    scope: dict[str, Any]
    body: bytes
    prompt: str
    salt: str


@dataclass(frozen=True)
class Reply:
    """What one of all replicas answered."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def call_of(scope: Mapping[str, Any], body: bytes) -> Call:
    """What is no request of a completion has no text, and goes where the load is lowest. Its replica refuses it."""
    key = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    prompt = salt = ""
    if scope["method"] == "POST":
        try:
            fields: Any = json.loads(body)
            given = fields.get("messages") or fields.get("prompt") or ""
            prompt = given if isinstance(given, str) else json.dumps([fields.get("tools") or [], given])
            salt = str(fields.get("cache_salt") or "")
        except (ValueError, AttributeError, RecursionError):
            prompt = salt = ""
    salt = hashlib.sha256(key + b" " + salt.encode(errors="surrogatepass")).hexdigest()
    return Call({name: scope[name] for name in PASSED_ON if name in scope}, body, prompt, salt)


async def reply(app: Any, call: Call, replica: str) -> Reply:
    return Reply(replica, *await whole(app, dict(call.scope), call.body))
