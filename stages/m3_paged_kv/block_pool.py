"""Physical blocks: which are free, and how many owners the others have."""

from collections.abc import Sequence
from typing import Protocol


class Pool(Protocol):  # what block tables ask of a pool
    num_blocks: int
    ref_counts: list[int]
    num_shared: int

    @property
    def num_free(self) -> int: ...
    def take(self, count: int) -> list[int]: ...
    def share(self, blocks: Sequence[int]) -> None: ...
    def release(self, blocks: Sequence[int]) -> None: ...


class BlockPool:
    """Blocks `0 ... num_blocks - 1`. Every operation costs O(1) for each block that it touches."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_shared = 0  # blocks with several owners
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, each with one owner from now on. The caller has looked at `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked for, {len(self._free)} free: look at num_free first")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.ref_counts[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each of these blocks."""
        for block in blocks:
            if self.ref_counts[block] < 1:
                raise RuntimeError(f"block {block} is free: it cannot be shared")
            self.num_shared += self.ref_counts[block] == 1
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer; a block without owners is free again."""
        for block in blocks:
            if self.ref_counts[block] < 1:
                raise RuntimeError(f"block {block} is released twice")
            self.ref_counts[block] -= 1
            self.num_shared -= self.ref_counts[block] == 1
            if self.ref_counts[block] == 0:
                self._free.append(block)
