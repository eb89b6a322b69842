"""Physical blocks: which are free, which of those still hold something worth finding, and who owns the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Blocks `0 ... num_blocks - 1`. Every operation costs O(1) for each block that it touches.

    A free block is empty, or *cached*: without an owner, but kept in the prefix index (`keep`) until its memory is
    needed. Empty blocks are taken first, then the cached one that was released longest ago; `on_evict` hears of it.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_shared = 0  # blocks with several owners
        self._on_evict = on_evict
        self._empty = list(range(num_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first; removal from the middle is O(1)
        self.kept: set[int] = set()  # blocks in the index, free or not

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def cached(self) -> Iterable[int]:
        """Free blocks that can still be found, in the order in which they will be evicted."""
        return self._cached.keys()

    def take(self, count: int) -> list[int]:
        """`count` free blocks, each with one owner from now on. The caller has looked at `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} blocks asked for, {self.num_free} free: look at num_free first")
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self.ref_counts[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these blocks; the first one for a cached block."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                if block not in self._cached:
                    raise RuntimeError(f"block {block} is free: nobody can share it")
                del self._cached[block]
            elif self.ref_counts[block] == 1:
                self.num_shared += 1
            self.ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner fewer; a block without owners is free again. Of blocks that are released together, the first ones
        are evicted first: give the end of a table before its beginning."""
        for block in blocks:
            if self.ref_counts[block] < 1:
                raise RuntimeError(f"block {block} is released twice")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 1:
                self.num_shared -= 1
            elif self.ref_counts[block] == 0 and block in self.kept:
                self._cached[block] = None
            elif self.ref_counts[block] == 0:
                self._empty.append(block)

    def is_free(self, block: int) -> bool:
        return self.ref_counts[block] == 0

    def keep(self, blocks: Iterable[int]) -> None:
        """The blocks are in the index now: they outlive their owners."""
        self.kept.update(blocks)

    def forget_all(self) -> None:
        """No block is in the index any more."""
        self._empty += self._cached
        self._cached.clear()
        self.kept.clear()

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self.kept.remove(block)
        if self._on_evict is not None:
            self._on_evict(block)
        return block

    def check_integrity(self) -> None:
        """Every block is held, cached or empty. For tests; O(pool)."""
        free = sorted([*self._empty, *self._cached])
        assert free == [block for block, count in enumerate(self.ref_counts) if count == 0], "the free lists are wrong"
        assert self._cached.keys() <= self.kept and self.kept.isdisjoint(self._empty), "an empty block is in the index"
        assert self.num_shared == sum(count > 1 for count in self.ref_counts)
