"""Which replica a request goes to: where most of its beginning is cached, and few other requests are in flight."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

BLOCK = 256  # characters of a prompt, some four blocks of 16 tokens


def keys_of(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> list[bytes]:
    """A key for each full block of a request's prompt, which depends on all text before it, the salt and the client's
    key: m6's chain, over characters, since a router has no tokenizer. What asks for no completion has none."""
    try:
        fields: Any = json.loads(body or b"{}")
        given = fields.get("messages") or fields.get("prompt") or ""
        prompt = given if isinstance(given, str) else json.dumps([fields.get("tools"), given])  # as in templates
        root = _hash(dict(headers).get(b"authorization", b""), str(fields.get("cache_salt")))
    except (ValueError, AttributeError, RecursionError):  # the replica refuses it
        return []
    blocks = (prompt[start : start + BLOCK] for start in range(0, len(prompt) - BLOCK + 1, BLOCK))
    return list(accumulate(blocks, _hash, initial=root))[1:]


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
        ties = {name: _hash(keys[0] if keys else b"", name) for name in in_flight}  # the same in all fronts
        return sorted(in_flight, key=lambda name: (self._request_cost * in_flight[name] - held[name], ties[name]))

    def add(self, keys: Sequence[bytes], replica: str) -> None:
        """The last blocks are the first to be forgotten: without those before them they are never found."""
        for key in reversed(keys):
            self._holders.setdefault(key, set()).add(replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)
