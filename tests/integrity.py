"""Whether a KV cache is sound: nothing is leaked, lost or owned twice. O(pool), so for tests alone."""

from collections import Counter
from collections.abc import Mapping, Sequence

from common.kv_cache import KVCacheManager
from stages.m1_kv_cache.kv_cache import RowCache
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache
from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex


def check_integrity(cache: KVCacheManager) -> None:
    """`AssertionError` where it is not. Of m0's, which keeps nothing, there is nothing to check."""
    if isinstance(cache, PrefixPagedCache):
        _check_blocks(cache._paged)
        _check_pool(cache.pool)
        _check_paths(cache.tables, cache._paths, cache._entries)
        _check_index(cache._entries, cache.index, cache.pool)
    elif isinstance(cache, PagedCache):
        _check_blocks(cache)
    elif isinstance(cache, SlotCache):
        slots = sorted(cache._free + list(cache._slots.values()))
        assert slots == list(range(cache.num_slots)), f"slots lost or owned twice: {slots}"
        assert cache._slots.keys() == cache._stored.keys()
        assert all(stored <= cache.slot_length for stored in cache._stored.values()), "a slot overflows"
    elif isinstance(cache, RowCache):
        assert len(cache._stored) <= cache.num_rows, "more requests than rows"
        assert all(stored <= cache.row_length for stored in cache._stored.values()), "a row overflows"


def _check_blocks(cache: PagedCache) -> None:
    for pool, tables in ((cache.pool, cache.tables), (cache.cpu_pool, cache.swapped_tables)):
        owners = Counter(block for table in tables.values() for block in table)
        for block, count in enumerate(pool.ref_counts):
            assert count == owners[block], f"block {block}: {owners[block]} owners, counted {count}"
        assert pool.num_blocks - pool.num_free == len(owners), "blocks are in use that belong to no request"
    assert cache.tables.keys() | cache.swapped_tables.keys() == cache._stored.keys()
    for id, table in cache.tables.items():
        assert len(set(table)) == len(table), f"{id} holds a block twice"
        assert len(table) >= cache.blocks_for(cache._stored[id]), f"{id} stores more tokens than its blocks hold"


def _check_index(entries: Mapping[int, Entry], index: PrefixIndex, pool: BlockPool) -> None:
    """Raise `AssertionError` unless each entry can be found, an owner of a block owns its parent, and a block is
    evicted before its parent."""
    assert entries.keys() == pool.indexed, "the index and the pool disagree"
    age = {block: at for at, block in enumerate(pool.reusable)}
    for block, entry in entries.items():
        assert entry.block == block and entry.parent is not None
        assert index.find(entry.parent, entry.tokens) is entry, f"block {block} cannot be found"
        if entry.parent.parent is None:
            continue
        above = entry.parent.block
        assert entries.get(above) is entry.parent, f"block {block} has lost its parent"
        assert pool.ref_counts[above] >= pool.ref_counts[block], f"block {block} is held without its parent {above}"
        assert above not in age or age[block] < age[above], f"block {above} is evicted before its child {block}"


def _check_paths(
    tables: Mapping[str, Sequence[int]], paths: Mapping[str, Sequence[Entry]], entries: Mapping[int, Entry]
) -> None:
    """Raise `AssertionError` unless every request's path is the beginning of its table, and all of it that is there."""
    for id, table in tables.items():
        path = [entry.block for entry in paths[id]]
        assert path == table[: len(path)], f"{id} holds other blocks than the index has for it"
        assert entries.keys().isdisjoint(table[len(path) :]), f"{id} holds an indexed block off its path"


def _check_pool(pool: BlockPool) -> None:
    """Every block is held, cached or empty. O(pool)."""
    free = sorted([*pool.empty, *pool.reusable])
    assert free == [block for block, count in enumerate(pool.ref_counts) if count == 0], "the free lists are wrong"
    assert pool.reusable.keys() <= pool.indexed and pool.indexed.isdisjoint(pool.empty), (
        "an empty block is in the index"
    )
    assert pool.num_shared == sum(count > 1 for count in pool.ref_counts)
