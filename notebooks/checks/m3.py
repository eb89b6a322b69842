"""The exercises of m3."""

from collections.abc import Callable, MutableSequence, Sequence

from notebooks.exercises import check, expect, expect_equal
from stages.m3_paged_kv.block_pool import BlockPool
from stages.m3_paged_kv.kv_cache import PagedCache


@check
def slot(answer: Callable[[Sequence[int], int, int], int]) -> str:
    """answer(block_table, position, block_size) -> the slot where that token's K and V lie."""
    table = [3, 7, 0, 12]
    for position, size in ((0, 16), (15, 16), (16, 16), (37, 16), (63, 16), (5, 4)):
        wanted = table[position // size] * size + position % size
        case = f"Token {position} of a request with the table {table}, blocks of {size}"
        expect_equal(answer(table, position, size), wanted, case)
    return "Block from the table, offset in the block: attention needs no more of paging."


@check
def missing_blocks(answer: Callable[[int, int, int], int]) -> str:
    """answer(held, tokens, block_size) -> how many blocks a request that holds `held` lacks for `tokens` tokens."""
    cache = PagedCache(64, 16)
    for held, tokens, why in (
        (0, 1, "its first token"),
        (0, 16, "exactly one block"),
        (1, 16, "the block that it has is just full"),
        (1, 17, "one token over the block's end"),
        (0, 50, "a whole prompt at once"),
        (2, 50, "half of a prompt is there"),
        (4, 50, "it has enough"),
        (5, 17, "it has more than enough"),
    ):
        wanted = max(0, cache.blocks_for(tokens) - held)
        expect_equal(answer(held, tokens, 16), wanted, f"{held} blocks held, {tokens} tokens, blocks of 16 ({why})")
    return "`Blocks needed` holds for any number of tokens; `does the length divide?` does not."


@check
def write(answer: Callable[[BlockPool, MutableSequence[int], int], object]) -> str:
    """answer(pool, table, index): make `table[index]` a block that its owner may write into."""
    pool = BlockPool(4)
    parent = pool.take(2)
    child = list(parent)
    pool.share(child)
    before = list(parent)
    answer(pool, child, 1)
    shared = f"Two requests hold block {parent[1]}, and one is about to write into it. Afterwards its table is still"
    expect(child[1] != parent[1], f"{shared} {child}: the other would read what this one writes.")
    expect(parent == before, f"The other request's table was {before}, and is {parent} now.")
    counts = [pool.ref_counts[block] for block in (parent[0], parent[1], child[1])]
    owned = f"Block {parent[0]} is shared by 2, {parent[1]} and {child[1]} belong to one request each"
    expect(counts == [2, 1, 1], f"{owned}; the pool counts {counts}. Release the original when you take a copy.")
    expect(pool.num_free == 1, f"3 of 4 blocks are in use, and the pool has {pool.num_free} free.")
    mine = child[1]
    answer(pool, child, 1)
    expect(child[1] == mine, "A block that is not shared was copied again: its only owner may write in place.")
    return "Copied once, at the first write, and only because it was shared."
