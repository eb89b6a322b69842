"""A match that ends inside a block: the block is copied, and its first tokens need not be computed."""

from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex


class PartialCopy:
    """Copies run before the step computes anything, so that the source must be of an earlier step; until the plan is
    made, no other request may get it: it is pinned."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, paged: PagedCache) -> None:
        self._index, self._pool, self._paged = index, pool, paged
        self._sources: list[int] = []

    def into(self, request_id: str, parent: Entry, tokens: tuple[int, ...], spare: int, step: int) -> int:
        """Give a request whose match ends at `parent` a copy of the block that continues best with its next `tokens`;
        returns how many of them it holds. A copy of less than a quarter of a block costs more than it saves. spare:
        blocks that may be taken; step: the plan being made."""
        found = self._index.closest(parent, tokens, step) if tokens else None
        if found is None or 4 * found[1] < self._paged.block_size:
            return 0
        source, count = found
        if self._pool.is_free(source.block) and spare < 1:
            return 0
        self._pool.share([source.block])
        self._sources.append(source.block)
        [copy] = self._pool.take(1)
        self._paged.copies.append((source.block, copy))
        self._paged.tables[request_id].append(copy)
        return count

    def unpin(self) -> None:
        """The plan is made: its copies come before whatever is planned later."""
        self._pool.release(self._sources)
        self._sources = []
