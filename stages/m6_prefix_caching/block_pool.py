"""Physical blocks: which are free, which of those are still in the index, and how many owners the others have."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Blocks `0 ... num_blocks - 1`. Every operation costs O(1) for each block that it touches.

    A free block is empty, or *reusable*: without an owner, but in the prefix index (`keep`) until its memory is needed.
    Empty blocks are taken first, then the least recently released reusable one (LRU); `on_evict` is called with it.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_shared = 0  # blocks with several owners
        self._on_evict = on_evict
        self.empty = list(range(num_blocks))[::-1]
        self.reusable: OrderedDict[int, None] = OrderedDict()  # least recently released first: LRU
        self.indexed: set[int] = set()  # blocks in the index, free or not

    @property
    def num_free(self) -> int:
        return len(self.empty) + len(self.reusable)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, each with one owner from now on. The caller has looked at `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} blocks asked for, {self.num_free} free: look at num_free first")
        taken = [self.empty.pop() if self.empty else self._evict() for _ in range(count)]
        for block in taken:
            self.ref_counts[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each of these blocks; the first one for a reusable block."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                if block not in self.reusable:
                    raise RuntimeError(f"block {block} is free: it cannot be shared")
                del self.reusable[block]
            elif self.ref_counts[block] == 1:
                self.num_shared += 1
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer; a block without owners is free again. Of a table, which is released as a whole, the last
        blocks are evicted first: leaves before parents."""
        for block in reversed(blocks):
            if self.ref_counts[block] < 1:
                raise RuntimeError(f"block {block} is released twice")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 1:
                self.num_shared -= 1
            elif self.ref_counts[block] == 0 and block in self.indexed:
                self.reusable[block] = None
            elif self.ref_counts[block] == 0:
                self.empty.append(block)

    def is_free(self, block: int) -> bool:
        return self.ref_counts[block] == 0

    def keep(self, blocks: Iterable[int]) -> None:
        """The blocks are in the index now: they outlive their owners."""
        self.indexed.update(blocks)

    def forget_all(self) -> None:
        """No block is in the index any more."""
        self.empty += self.reusable
        self.reusable.clear()
        self.indexed.clear()

    def _evict(self) -> int:
        block, _ = self.reusable.popitem(last=False)
        self.indexed.remove(block)
        if self._on_evict is not None:
            self._on_evict(block)
        return block
