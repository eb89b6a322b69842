"""What a scheduler asks of a KV cache. Each stage that changes *where K and V live* implements it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from common.plan import BlockCopies
from common.request import Request
from common.watch.kv_memory import KVUsage, PrefixNode, PrefixStats, Region


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

    def check_integrity(self) -> None:
        """Raise `AssertionError` if anything is leaked, lost or owned twice. For tests; O(pool)."""
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
