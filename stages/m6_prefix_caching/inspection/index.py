"""Looking at an index as a whole."""

from collections.abc import Mapping

from common.kv_cache import PrefixNode
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.prefix_index import Entry


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
