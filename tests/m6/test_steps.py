"""The chain of hashes and the look-up of a prompt's beginning, one step at a time."""

from __future__ import annotations

from common import SamplingParams
from common.request import Request
from stages.m6_prefix_caching.hash_index import HashIndex, chain_hash
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache
from stages.m6_prefix_caching.prefix_index import Entry
from tests.steps import same

# -- the index --------------------------------------------------------------------------------------------------------


def add(index: HashIndex, parent: Entry, tokens: tuple[int, ...], block: int) -> Entry:
    entry = index.add(parent, tokens, block)
    assert entry is not None, f"`add` of {tokens} as block {block} returned None, though its place is free"
    return entry


def test_a_block_is_found_again() -> None:
    index = HashIndex()
    root = index.root(None)
    same("Is (1, 2) found in an empty index?", index.find(root, (1, 2)) is not None, False)
    entry = add(index, root, (1, 2), 7)
    same("the block of the entry that `add` made for block 7", entry.block, 7)
    same("Does `find` give that entry?", index.find(root, (1, 2)) is entry, True)
    same("Are other tokens found?", index.find(root, (1, 3)) is not None, False)


def test_a_key_depends_on_all_tokens_before() -> None:
    same(
        "equal keys of the block (1, 2) after two beginnings?", chain_hash(11, (1, 2)) == chain_hash(22, (1, 2)), False
    )
    same("equal keys of (1, 2) and (2, 1)?", chain_hash(11, (1, 2)) == chain_hash(11, (2, 1)), False)
    same("equal keys of the same block, asked twice?", chain_hash(11, (1, 2)) == chain_hash(11, (1, 2)), True)


def test_a_key_depends_on_the_order_of_the_blocks() -> None:
    here = chain_hash(chain_hash(11, (1, 2)), (3, 4))
    same("equal keys after 1 2 | 3 4 and after 3 4 | 1 2?", here == chain_hash(chain_hash(11, (3, 4)), (1, 2)), False)
    twice = chain_hash(chain_hash(11, (1, 2)), (1, 2))
    same("after 1 2 | 1 2: is it the key that was there before both?", twice == 11, False)


def test_equal_tokens_after_another_beginning_are_another_block() -> None:
    index = HashIndex()
    root = index.root(None)
    here, there = add(index, root, (1, 1), 0), add(index, root, (2, 2), 1)
    after_here = add(index, here, (5, 6), 2)
    same("Is (5, 6) found after another beginning?", index.find(there, (5, 6)) is not None, False)
    after_there = add(index, there, (5, 6), 3)
    blocks = [entry.block for entry in (after_here, after_there)]
    same("blocks of (5, 6) after the one and after the other beginning", blocks, [2, 3])


def test_a_hash_alone_is_not_believed() -> None:
    index = HashIndex(lambda key, tokens: 0)
    root = index.root(None)
    add(index, root, (1, 2), 0)
    same("Is (3, 4) found, whose key is also that of (1, 2)?", index.find(root, (3, 4)) is not None, False)
    same(
        "Does `add` of (3, 4) give an entry, though its place is taken?", index.add(root, (3, 4), 1) is not None, False
    )
    same("Is (1, 2) still there?", index.find(root, (1, 2)) is not None, True)


def test_a_parent_is_compared_too() -> None:
    index = HashIndex(lambda key, tokens: 0)
    add(index, index.root("here"), (1, 2), 0)
    found = index.find(index.root("there"), (1, 2)) is not None
    same("Are equal tokens with an equal key found after another parent?", found, False)


def test_the_first_block_keeps_its_place() -> None:
    index = HashIndex()
    root = index.root(None)
    first = add(index, root, (1, 2), 7)
    again = index.add(root, (1, 2), 9)
    same("Does `add` of a known content give the entry that is there?", again is first, True)
    same("its block", first.block, 7)


# -- the look-up ------------------------------------------------------------------------------------------------------


def request(name: str, *tokens: int) -> Request:
    return Request(name, list(tokens), SamplingParams(), frozenset(), 0, 0.0)


def served(cache: PrefixPagedCache, one: Request) -> None:
    """Compute all of a request's tokens."""
    cache.attach_prefix(one)
    assert cache.grow(one, one.num_tokens)
    cache.mark_computed(one, one.num_tokens)
    cache.take_copies()


def cache_with(*tokens: int, blocks: int = 16) -> PrefixPagedCache:
    """Blocks of 2; a request of these tokens runs."""
    cache = PrefixPagedCache(blocks, 2, 0, HashIndex())
    served(cache, request("first", *tokens))
    return cache


def found(cache: PrefixPagedCache, *tokens: int) -> int:
    """Tokens of a new request that the cache has."""
    return 2 * len(cache._match(request("new", *tokens)))


def test_the_longest_known_beginning_is_found() -> None:
    cache = cache_with(1, 2, 3, 4, 5, 6)
    tried = "cached: 1 2 | 3 4 | 5 6. Tokens found of"
    same(f"{tried} 1 2 3 4 9 9", found(cache, 1, 2, 3, 4, 9, 9), 4)


def test_the_search_ends_at_the_first_unknown_block() -> None:
    cache = cache_with(1, 2, 3, 4, 5, 6)
    tried = "cached: 1 2 | 3 4 | 5 6. Tokens found of"
    same(f"{tried} 9 9 3 4 5 6", found(cache, 9, 9, 3, 4, 5, 6), 0)
    same(f"{tried} 1 2 9 9 5 6 7", found(cache, 1, 2, 9, 9, 5, 6, 7), 2)


def test_the_last_token_is_always_computed() -> None:
    cache = cache_with(1, 2, 3, 4, 5, 6)
    tried = "cached: 1 2 | 3 4 | 5 6. Tokens found of"
    same(f"{tried} 1 2 3 4: its last token's logits are wanted", found(cache, 1, 2, 3, 4), 2)
    same(f"{tried} 1 2 3 4 5", found(cache, 1, 2, 3, 4, 5), 4)


def test_only_whole_blocks_are_found() -> None:
    same("cached: 1 2 | 3 4. Tokens found of 1 2 3 9 9", found(cache_with(1, 2, 3, 4), 1, 2, 3, 9, 9), 2)


def test_tokens_in_flight_are_not_known() -> None:
    one = request("new", 1, 2, 3)
    one.num_tokens += 2  # 5 tokens in all
    got = cache_with(1, 2, 3, 4)._usable(one)
    same("usable tokens of 1 2 3 and two more that are not known here yet", got, 3)
    one.num_tokens -= 2
    same("usable tokens of 1 2 3", cache_with(1, 2, 3, 4)._usable(one), 2)


def left(cache: PrefixPagedCache, one: Request) -> int:
    return cache._left_if_started(one, cache._match(one))


def test_shared_blocks_need_no_room() -> None:
    """`first` holds 2 of 8 blocks and is kept one more to grow; 2 are shared, 2 new ones for tokens 5 to 7."""
    got = left(cache_with(1, 2, 3, 4, blocks=8), request("new", 1, 2, 3, 4, 5, 6))
    same("8 blocks, 2 held by a running request that shares them. Left if 6 tokens start, 4 of them shared", got, 3)


def test_blocks_that_are_revived_are_free_no_more() -> None:
    cache = cache_with(1, 2, 3, 4, blocks=8)
    cache.free(request("first", 1, 2, 3, 4))
    same("free blocks once their owner has gone, of 8", cache.pool.num_free, 8)
    got = left(cache, request("new", 1, 2, 3, 4, 5, 6))
    same("8 free blocks, 2 of them cached. Left if 6 tokens start that share those 2 and take 2 more", got, 4)


def test_each_sibling_is_kept_a_block() -> None:
    one = request("new", 5, 6, 7)
    alone = left(cache_with(1, 2, blocks=8), one)
    one.siblings = [request("sibling", 5, 6, 7)]
    same("Blocks fewer if a sample more will fork", alone - left(cache_with(1, 2, blocks=8), one), 1)
