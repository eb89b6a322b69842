"""Which replica a request goes to: where most of its beginning is cached, and few other requests are in flight."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK = 256  # characters of a prompt, some four blocks of 16 tokens


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica: ASGI's scope, the body, and the keys of the blocks of its prompt."""

    scope: dict[str, Any]
    body: bytes
    keys: list[bytes]


def call_of(scope: Mapping[str, Any], body: bytes) -> Call:
    """What asks for no completion has no keys, and goes where the load is lowest."""
    keys: list[bytes] = []
    try:
        fields: Any = json.loads(body or b"{}")
        given = fields.get("messages") or fields.get("prompt") or ""
        prompt = given if isinstance(given, str) else json.dumps([fields.get("tools"), given])  # as in templates
        keys = block_keys(f"{dict(scope['headers']).get(b'authorization')} {fields.get('cache_salt')}", prompt)
    except (ValueError, AttributeError, RecursionError):  # the replica refuses it
        pass
    plain = str | bytes | list | tuple  # without the front's application, and what else stays there
    return Call({name: value for name, value in scope.items() if isinstance(value, plain)}, body, keys)


def block_keys(salt: str, prompt: str) -> list[bytes]:
    """A key for each full block, which depends on the salt and on all text before it: m6's chain, over characters,
    since a router has no tokenizer."""
    keys = [salt.encode(errors="surrogatepass")]
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        keys.append(_hash(keys[-1], prompt[start : start + BLOCK]))
    return keys[1:]


def _hash(before: bytes, text: str) -> bytes:
    return hashlib.blake2b(before + text.encode(errors="surrogatepass"), digest_size=8).digest()


class Prefixes:
    """Remembers where prompts went. A guess: a replica may have evicted a beginning since, which costs time only.

    request_cost: blocks that would rather be computed again than wait behind one more request in flight.
    most: blocks that are remembered, those of the last prompts.
    """

    def __init__(self, request_cost: float = 4.0, most: int = 1 << 17) -> None:
        self._request_cost, self._most = request_cost, most
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def order(self, keys: Sequence[bytes], in_flight: Mapping[str, int]) -> list[str]:
        """The replicas, best first. in_flight: requests of each."""
        held, having = dict.fromkeys(in_flight, 0), set(in_flight)
        for count, key in enumerate(keys, start=1):
            having &= self._holders.get(key, set())
            held.update(dict.fromkeys(having, count))
            if not having:
                break

        def cost(replica: str) -> tuple[float, bytes]:
            tie = _hash(keys[0] if keys else b"", replica)  # the same in all fronts
            return self._request_cost * in_flight[replica] - held[replica], tie

        return sorted(in_flight, key=cost)

    def add(self, keys: Sequence[bytes], replica: str) -> None:
        """The last blocks are the first to be forgotten: without those before them they are never found."""
        for key in reversed(keys):
            self._holders.setdefault(key, set()).add(replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)
