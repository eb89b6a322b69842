"""Which replica a request goes to: where most of its beginning is cached, and few other requests are in flight."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

BLOCK = 256  # characters of a prompt, some four blocks of 16 tokens


def block_keys(salt: str, prompt: str) -> list[bytes]:
    """A key for each full block, which depends on the salt and on all text before it: m6's chain, over characters,
    since a router has no tokenizer."""
    keys, parent = list[bytes](), salt.encode(errors="surrogatepass")
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        parent = _hash(parent, prompt[start : start + BLOCK])
        keys.append(parent)
    return keys


def _hash(before: bytes, text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=before[:64]).digest()


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
        first = keys[0] if keys else b""
        held = self._held(keys, in_flight)

        def cost(replica: str) -> tuple[float, bytes]:
            missing = len(keys) - held[replica]
            return missing + self._request_cost * in_flight[replica], _hash(first, replica)  # equal: all fronts agree

        return sorted(in_flight, key=cost)

    def _held(self, keys: Sequence[bytes], replicas: Collection[str]) -> dict[str, int]:
        """How many first blocks each has."""
        held, having = dict.fromkeys(replicas, 0), set(replicas)
        for count, key in enumerate(keys, start=1):
            having = having & self._holders.get(key, set())
            if not having:
                break
            held.update(dict.fromkeys(having, count))
        return held

    def add(self, keys: Sequence[bytes], replica: str) -> None:
        """The last blocks are the first to be forgotten: without those before them they are never found."""
        for key in reversed(keys):
            self._holders.setdefault(key, set()).add(replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget what the others held."""
        for key, holders in list(self._holders.items()):
            holders.intersection_update(replicas)
            if not holders:
                del self._holders[key]
