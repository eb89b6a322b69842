"""Looking at an index as a whole: for pictures, and for tests."""

from collections.abc import Mapping, Sequence

from common.watch.kv_memory import PrefixNode
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex


def tree(entries: Mapping[int, Entry], pool: BlockPool) -> list[PrefixNode]:
    """All entries, parents before children. `entries`: by their blocks."""
    numbers: dict[Entry | None, int] = {}
    nodes: list[PrefixNode] = []
    for entry in sorted(entries.values(), key=_depth):
        numbers[entry] = len(nodes)
        nodes.append(PrefixNode(numbers.get(entry.parent), entry.tokens, entry.hits, pool.ref_counts[entry.block]))
    return nodes


def _depth(entry: Entry) -> int:
    depth = 0
    while entry.parent is not None:
        entry, depth = entry.parent, depth + 1
    return depth


def check_index(entries: Mapping[int, Entry], index: PrefixIndex, pool: BlockPool) -> None:
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


def check_paths(
    tables: Mapping[str, Sequence[int]], paths: Mapping[str, Sequence[Entry]], entries: Mapping[int, Entry]
) -> None:
    """Raise `AssertionError` unless every request's path is the beginning of its table, and all of it that is there."""
    for id, table in tables.items():
        path = [entry.block for entry in paths[id]]
        assert path == table[: len(path)], f"{id} holds other blocks than the index has for it"
        assert entries.keys().isdisjoint(table[len(path) :]), f"{id} holds an indexed block off its path"


def check_pool(pool: BlockPool) -> None:
    """Every block is held, cached or empty. O(pool)."""
    free = sorted([*pool.empty, *pool.reusable])
    assert free == [block for block, count in enumerate(pool.ref_counts) if count == 0], "the free lists are wrong"
    assert pool.reusable.keys() <= pool.indexed and pool.indexed.isdisjoint(pool.empty), (
        "an empty block is in the index"
    )
    assert pool.num_shared == sum(count > 1 for count in pool.ref_counts)
