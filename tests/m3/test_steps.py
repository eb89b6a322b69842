"""The block pool, the block tables and the look-up through them, one step at a time."""

from __future__ import annotations

import pytest
import torch

from common import SamplingParams
from common.plan import Chunk, StepPlan
from common.request import Request
from stages.m3_paged_kv.attention import GatherAttention
from stages.m3_paged_kv.batch import PagedBatches
from stages.m3_paged_kv.block_pool import BlockPool
from stages.m3_paged_kv.kv_cache import PagedCache
from tests.steps import same

# -- the pool ---------------------------------------------------------------------------------------------------------


def test_taken_blocks_are_not_free() -> None:
    pool = BlockPool(5)
    first, second = pool.take(2), pool.take(2)
    same("blocks given out twice, of two `take(2)`", sorted(set(first) & set(second)), [])
    same("blocks in all after `take(2)` twice", len({*first, *second}), 4)
    same("`num_free` of 5 blocks after `take(2)` twice", pool.num_free, 1)


def test_a_taken_block_has_one_owner() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    same("`ref_counts` of the blocks of `take(2)`", [pool.ref_counts[block] for block in blocks], [1, 1])


def test_too_many_blocks_are_refused() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(RuntimeError):
        pool.take(3)
    same("`num_free` of 3 blocks after `take(1)` and a refused `take(3)`", pool.num_free, 2)


def test_a_released_block_is_free() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    pool.release(blocks[:1])
    same("`num_free` after one of 2 blocks is released", pool.num_free, 1)
    same("the next block that is taken", pool.take(1), blocks[:1])


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(1)
    [block] = pool.take(1)
    pool.share([block])
    same("`ref_counts` of a block with two owners", pool.ref_counts[block], 2)
    pool.release([block])
    same("`num_free` after the first of two owners has released the only block", pool.num_free, 0)
    pool.release([block])
    same("`num_free` after the second one has released it", pool.num_free, 1)


def test_a_free_block_is_neither_shared_nor_released() -> None:
    pool = BlockPool(1)
    for call in (pool.share, pool.release):
        with pytest.raises(RuntimeError):
            call([0])
    same("`num_free` after these errors", pool.num_free, 1)


# -- the block tables -------------------------------------------------------------------------------------------------


def request(name: str, tokens: int) -> Request:
    return Request(name, list(range(1, tokens + 1)), SamplingParams(), frozenset(), 0, 0.0)


def stored(cache: PagedCache, name: str, tokens: int) -> Request:
    """A request whose tokens are all in the cache."""
    one = request(name, tokens)
    same(f"`grow` of a new request to {tokens} tokens", cache.grow(one, tokens), True)
    cache.mark_computed(one, tokens)
    return one


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_needed_are_rounded_up(tokens: int, blocks: int) -> None:
    same(f"`blocks_for({tokens})` with blocks of 16", PagedCache(8, 16).blocks_for(tokens), blocks)


def test_growing_takes_what_is_missing() -> None:
    cache = PagedCache(8, 4)
    one = stored(cache, "a", 5)
    same("blocks of a request with 5 tokens, 4 to a block", len(cache.block_table(one)), 2)
    first = list(cache.block_table(one))
    cache.grow(one, 8)
    same("its block table after `grow` to 8 tokens, which fit", list(cache.block_table(one)), first)
    cache.grow(one, 9)
    same("its first blocks after `grow` to 9 tokens", list(cache.block_table(one))[:2], first)
    same("how many it has then", len(cache.block_table(one)), 3)
    same("`num_free` of 8 blocks", cache.pool.num_free, 5)


def test_a_request_that_cannot_grow_changes_nothing() -> None:
    cache = PagedCache(3, 4)
    one = stored(cache, "a", 8)
    same("`grow` to 4 blocks, of 3 that there are", cache.grow(one, 16), False)
    same("its blocks after that", len(cache.block_table(one)), 2)
    same("`num_free` after that", cache.pool.num_free, 1)


def test_a_freed_request_gives_its_blocks_back() -> None:
    cache = PagedCache(3, 4)
    one = stored(cache, "a", 12)
    cache.free(one)
    same("`num_free` of 3 blocks after their owner is freed", cache.pool.num_free, 3)
    same("block tables that are left", cache.tables, {})
    cache.free(one)  # no error


def test_a_swapped_request_gives_its_cpu_blocks_back() -> None:
    cache = PagedCache(3, 4, num_cpu_blocks=3)
    one = stored(cache, "a", 8)
    cache.swap_out(one)
    same("`cpu_pool.num_free` of 3 while a request of 2 blocks is swapped out", cache.cpu_pool.num_free, 1)
    cache.free(one)
    same("`cpu_pool.num_free` of 3 once it is freed", cache.cpu_pool.num_free, 3)
    same("`swapped_tables` that are left", cache.swapped_tables, {})
    same("`num_free` of the 3 blocks of the device", cache.pool.num_free, 3)


def test_nothing_is_stored_of_a_freed_request() -> None:
    cache = PagedCache(3, 4)
    cache.free(stored(cache, "a", 8))
    same("`_stored` after the only request is freed", cache._stored, {})


def test_a_fork_shares_the_blocks() -> None:
    cache = PagedCache(4, 4)
    parent, child = stored(cache, "parent", 6), request("child", 6)
    cache.fork(parent, child)
    same("the child's block table", list(cache.block_table(child)), list(cache.block_table(parent)))
    same("`num_free` of 4 blocks: a fork costs nothing", cache.pool.num_free, 2)
    counts = [cache.pool.ref_counts[block] for block in cache.block_table(parent)]
    same("`ref_counts` of the two shared blocks", counts, [2, 2])
    same("the child's computed tokens", child.num_computed_tokens, 6)
    same("Is it one list for both?", cache.tables["child"] is cache.tables["parent"], False)


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    cache = PagedCache(6, 4)
    parent, child = stored(cache, "parent", 6), request("child", 6)
    cache.fork(parent, child)
    before = list(cache.block_table(parent))
    cache.grow(child, 7)
    same("the parent's block table after the child has grown", list(cache.block_table(parent)), before)
    mine = list(cache.block_table(child))
    same("Do both write into one block?", mine[1] == before[1], False)
    same("the full block, which nobody writes: still shared?", mine[0] == before[0], True)
    same("(source, copy) pairs for the plan", cache.take_copies(), [(before[1], mine[1])])
    counts = [cache.pool.ref_counts[block] for block in (before[0], before[1], mine[1])]
    same("`ref_counts` of the full block, the original and the copy", counts, [2, 1, 1])
    cache.grow(parent, 7)
    same("copies for the parent, which owns the original alone now", cache.take_copies(), [])


@pytest.mark.parametrize(("tokens", "admitted"), [(7, True), (8, False)])
def test_admission_counts_the_first_new_token(tokens: int, admitted: bool) -> None:
    got = PagedCache(2, 4).can_admit(request("a", tokens))
    same(f"`can_admit` a prompt of {tokens} tokens into 2 blocks of 4", got, admitted)


def test_admission_leaves_a_block_for_each_other_request() -> None:
    cache = PagedCache(4, 4)
    stored(cache, "a", 4)
    tried = "1 of 4 blocks is held. `can_admit` a prompt that takes"
    same(f"{tried} 2 of the others", cache.can_admit(request("b", 7)), True)
    same(f"{tried} all 3 others, so that the running request could not grow", cache.can_admit(request("b", 11)), False)


# -- the look-up ------------------------------------------------------------------------------------------------------


def slots(*chunks: Chunk) -> list[int]:
    return PagedBatches(4)(StepPlan(list(chunks)), torch.device("cpu")).slot_mapping.tolist()


def test_a_slot_is_a_place_in_a_block() -> None:
    got = slots(Chunk(request("a", 4), 0, 4, [0]))
    same("slots of tokens 0 to 3, blocks of 4, of a request with the block table [0]", got, [0, 1, 2, 3])


def test_a_slot_is_found_through_the_block_table() -> None:
    got = slots(Chunk(request("a", 4), 0, 4, [5]))
    same("slots of 4 tokens, blocks of 4, block table [5]", got, [20, 21, 22, 23])
    got = slots(Chunk(request("a", 6), 0, 6, [7, 2]))
    same("slots of 6 tokens, blocks of 4, block table [7, 2]", got, [28, 29, 30, 31, 8, 9])


def test_a_later_chunk_goes_on_where_the_last_one_ended() -> None:
    got = slots(Chunk(request("a", 6), 5, 1, [7, 2]))
    same("the slot of token 5 alone (a decode), blocks of 4, block table [7, 2]", got, [9])


def test_each_sequence_has_a_block_table_of_its_own() -> None:
    got = slots(Chunk(request("a", 3), 2, 1, [6]), Chunk(request("b", 6), 4, 2, [1, 3]))
    same("slots of token 2 with the table [6] and of tokens 4 and 5 with [1, 3], blocks of 4", got, [26, 12, 13])


def test_gathered_keys_are_in_the_order_of_the_table() -> None:
    """A block is 2 tokens of 1 head of dimension 1; token t of block b holds 10 b + t."""
    cache = torch.tensor([[10.0 * b, 10.0 * b + 1] for b in range(4)]).view(4, 2, 1, 1)
    got = GatherAttention._gather(cache, torch.tensor([[3, 1], [0, 2]]))
    same("the shape of 2 tables of 2 blocks of 2 tokens, [B, Hkv, M * block_size, D]", list(got.shape), [2, 1, 4, 1])
    tried = "keys gathered through the table"
    same(f"{tried} [3, 1]", got[0].flatten().tolist(), [30.0, 31.0, 10.0, 11.0])
    same(f"{tried} [0, 2]", got[1].flatten().tolist(), [0.0, 1.0, 20.0, 21.0])


def test_gathered_heads_stay_apart() -> None:
    cache = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 2, 2, 1)  # a block of 2 tokens with 2 heads
    got = GatherAttention._gather(cache, torch.tensor([[0]]))
    same("the shape, [B, Hkv, M * block_size, D]", list(got.shape), [1, 2, 2, 1])
    same("head 0 of tokens with the heads (0, 1) and (2, 3)", got[0, 0].flatten().tolist(), [0.0, 2.0])
