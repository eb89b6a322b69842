"""The block pool, the block tables and the look-up through them, one step at a time."""

from __future__ import annotations

import pytest

from stages.m3_paged_kv.block_pool import BlockPool
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
