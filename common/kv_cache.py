"""What a scheduler asks of a KV cache. Each stage that changes *where K and V live* implements it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@dataclass(slots=True)
class PrefixStats:
    """What a prefix cache has saved, since `reset_prefix_stats()`. Tokens of prompts, except `recovered`.

    asked: tokens of the requests that started, and saved: those of them that were cached. recovered: tokens that
    preempted requests found again, prompt and output. blocks: taken from the cache at a start. evictions: of cached
    blocks. shared, peak_shared: blocks of several requests, now and at most in one step. cached: blocks in the index.
    """

    asked: int = 0
    saved: int = 0
    recovered: int = 0
    blocks: int = 0
    evictions: int = 0
    shared: int = 0
    peak_shared: int = 0
    cached: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.saved / self.asked if self.asked else None


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """A cached block: its place in the list of all nodes is its number. `parent`: the number of the block before it,
    None for the first one of a prompt. `hits`: requests that started with it; `owners`: requests that hold it now."""

    parent: int | None
    tokens: tuple[int, ...]
    hits: int
    owners: int


@runtime_checkable
class PrefixCache(Protocol):
    """What a KV cache with an index of prefixes also offers (from m6 on). The engine asks with `isinstance`."""

    def prefix_stats(self) -> PrefixStats: ...

    def reset_prefix_stats(self) -> None: ...

    def prefix_tree(self) -> list[PrefixNode]:
        """What can be found, parents before children, for pictures. O(pool)."""
        ...

    def kept_regions(self) -> list[Region]:
        """Free memory that is still in the index. No owners."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all cached beginnings; running requests keep what they hold."""


class KVCacheManager(Protocol):
    """Bookkeeping in plain Python: which request holds which part of the cache. No tensors."""

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        """Could a request of this many tokens, prompt and output, ever run?"""
        ...

    def can_admit(self, request: Request) -> bool:
        """Is there room for a request that waits?"""
        ...

    def grow(self, request: Request, upto: int) -> bool:
        """Hold room for the request's first `upto` tokens; False, with nothing changed, where there is none."""
        ...

    def mark_computed(self, request: Request, upto: int) -> None:
        """Advance the request's progress (`num_computed_tokens`) to `upto`: the planned step stores these tokens."""

    def block_table(self, request: Request) -> Sequence[int]: ...

    def free(self, request: Request) -> None:
        """Give back everything that the request holds; a request that holds nothing is no error."""

    def usage(self) -> KVUsage: ...

    def regions(self) -> list[Region]:
        """The KV memory as it is held now, for pictures: each region that has an owner. O(pool)."""
        ...


@runtime_checkable
class PagedManager(KVCacheManager, Protocol):
    """What a scheduler asks of a cache in blocks (from m3 on)."""

    @property
    def tables(self) -> dict[str, list[int]]:
        """Block tables of the requests that hold blocks on the device, by their ids."""
        ...

    def attach_prefix(self, request: Request) -> None:
        """Start a request with what the cache has of its first tokens (nothing before m6)."""

    def fork(self, parent: Request, child: Request) -> None:
        """The child shares the parent's blocks until one of them writes."""

    def swap_out(self, request: Request) -> BlockCopies | None:
        """(device block, CPU block) pairs to copy, or None where the CPU pool has no room."""

    def swap_in(self, request: Request) -> BlockCopies | None:
        """(CPU block, device block) pairs to copy, or None where the device has no room."""

    def take_copies(self) -> BlockCopies:
        """(source, destination) pairs of the shared blocks that the step being planned writes into, once."""
        ...
