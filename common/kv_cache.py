"""What a scheduler asks of a KV cache. Each stage that changes *where K and V live* implements it anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.plan import BlockCopies
from common.request import Request


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Token slots: `capacity` in all, `reserved` held by running requests, `stored` filled with a token's K and V.
    `blocks`: what the reserved ones make up: blocks, or whole rows and slots before m3."""

    capacity: int = 0
    reserved: int = 0
    stored: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """`length` neighbouring token slots from `start` on, `stored` of them filled, held by `owners` (request ids)."""

    start: int
    length: int
    stored: int
    owners: tuple[str, ...]


class KVCacheManager(Protocol):
    """Bookkeeping in plain Python: who holds which part of the cache. No tensors."""

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        """Could a request of so many tokens, prompt and output, ever run?"""
        ...

    def can_admit(self, request: Request) -> bool:
        """Is there room for a request that waits?"""
        ...

    def grow(self, request: Request, upto: int) -> bool:
        """Hold room for the request's first `upto` tokens; False, with nothing changed, where there is none."""
        ...

    def commit(self, request: Request, upto: int) -> None:
        """The step just planned computes K and V of the first `upto` tokens."""
        ...

    def block_table(self, request: Request) -> Sequence[int]: ...

    def free(self, request: Request) -> None:
        """Give back everything that the request holds; a request that holds nothing is no error."""
        ...

    def usage(self) -> KVUsage: ...

    def regions(self) -> list[Region]:
        """The KV memory as it is held now, for pictures: each region that somebody holds. O(pool)."""
        ...

    def check_integrity(self) -> None:
        """Raise `AssertionError` if anything is leaked, lost or owned twice. For tests; O(pool)."""
        ...


class PagedManager(KVCacheManager, Protocol):
    """What a scheduler asks of a cache in blocks (from m3 on)."""

    @property
    def tables(self) -> dict[str, list[int]]:
        """Block tables of those who hold blocks on the device, by request id."""
        ...

    def cached_prefix(self, request: Request) -> int:
        """Start a request with what the cache has of its first tokens: how many (0 before m6)."""
        ...

    def fork(self, parent: Request, child: Request) -> None:
        """The child shares the parent's blocks until one of them writes."""
        ...

    def swap_out(self, request: Request) -> BlockCopies | None:
        """(device block, CPU block) pairs to copy, or None where the CPU pool has no room."""
        ...

    def swap_in(self, request: Request) -> BlockCopies | None:
        """(CPU block, device block) pairs to copy, or None where the device has no room."""
        ...

    def take_copies(self) -> BlockCopies:
        """(source, destination) pairs of the shared blocks that the step being planned writes into, once."""
        ...
