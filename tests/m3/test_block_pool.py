"""The block pool and the paged cache as bookkeeping: no model, no scheduler, any order of calls."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import SamplingParams
from common.plan import BlockCopies
from common.request import Request
from stages.m3_paged_kv.block_pool import BlockPool
from stages.m3_paged_kv.kv_cache import PagedCache
from tests.depth import by_depth

SETTINGS = settings(
    max_examples=by_depth(60, 600), stateful_step_count=40, deadline=None, derandomize=True, database=None
)


class PoolMachine(RuleBasedStateMachine):
    """Against a list of owners: an owner is in it as often as it holds the block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.owned: list[int] = []

    @rule(count=st.integers(0, 7))
    def take(self, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(RuntimeError, match=f"{count} blocks asked for, {free} free"):
                self.pool.take(count)
            return
        blocks = self.pool.take(count)
        assert len(set(blocks)) == count and not set(blocks) & set(self.owned)
        self.owned += blocks

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.pool.share([block])
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.pool.release([block])
        self.owned.remove(block)

    @invariant()
    def counts(self) -> None:
        owners = Counter(self.owned)
        assert self.pool.ref_counts == [owners[block] for block in range(6)]
        assert len(owners) == 6 - self.pool.num_free


class CacheMachine(RuleBasedStateMachine):
    """Requests write their own name into the slots that the cache gives them, and read back what they wrote."""

    @initialize(size=st.sampled_from([1, 2, 3, 4]), blocks=st.integers(1, 9), cpu_blocks=st.sampled_from([0, 2, 9]))
    def start(self, size: int, blocks: int, cpu_blocks: int) -> None:
        self.cache = PagedCache(blocks, size, cpu_blocks)
        self.memory: dict[int, str] = {}
        self.cpu_memory: dict[int, str] = {}
        self.requests: list[Request] = []
        self.written: dict[str, list[str]] = {}
        self.count = 0

    @rule(length=st.integers(1, 12))
    def admit(self, length: int) -> None:
        request = self._request(length)
        fits = self.cache.blocks_for(length) <= self.cache.pool.num_free
        assert not self.cache.can_admit(request) or fits
        assert self.cache.grow(request, length) == fits
        if fits:
            self._add(request)
            self._write(request, length)

    @precondition(lambda self: any(True for _ in self._resident()))
    @rule(data=st.data(), more=st.integers(1, 5))
    def grow(self, data: st.DataObject, more: int) -> None:
        request = data.draw(st.sampled_from(self._resident()))
        before = self.cache.pool.num_free, list(self.cache.block_table(request))
        if self.cache.grow(request, request.num_computed_tokens + more):
            self._write(request, request.num_computed_tokens + more)
        else:
            assert (self.cache.pool.num_free, list(self.cache.block_table(request))) == before, "refused, yet changed"
            assert self.cache.take_copies() == []

    @precondition(lambda self: any(True for _ in self._resident()))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self._resident()))
        child = self._request(parent.num_prompt_tokens)
        free = self.cache.pool.num_free
        self.cache.fork(parent, child)
        self._add(child)
        self.written[child.id] = list(self.written[parent.id])
        assert self.cache.pool.num_free == free, "a fork costs nothing"

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.cache.free(request)
        self.cache.free(request)  # no error

    @precondition(lambda self: any(True for _ in self._resident()))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._resident()))
        needed, free = len(self.cache.block_table(request)), self.cache.cpu_pool.num_free
        moves = self.cache.swap_out(request)
        assert (moves is None) == (needed > free)
        self._move(self.memory, self.cpu_memory, moves or [])

    @precondition(lambda self: len(self._resident()) < len(self.requests))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([r for r in self.requests if r not in self._resident()]))
        moves = self.cache.swap_in(request)
        self._move(self.cpu_memory, self.memory, moves or [])
        assert moves is None or self.cache.pool.num_free >= len(self.cache.tables) - 1, "no other request could grow"

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for request in self._resident():
            slots = self._slots(request, len(self.written[request.id]))
            assert [self.memory[slot] for slot in slots] == self.written[request.id]
        usage, regions = self.cache.usage(), self.cache.regions()
        assert usage.reserved == sum(region.length for region in regions)
        assert usage.stored == sum(region.stored for region in regions)
        distinct = {slot for r in self._resident() for slot in self._slots(r, r.num_computed_tokens)}
        assert usage.stored == len(distinct)

    def teardown(self) -> None:
        for request in getattr(self, "requests", []):
            self.cache.free(request)
        if hasattr(self, "cache"):
            assert all(pool.num_free == pool.num_blocks for pool in (self.cache.pool, self.cache.cpu_pool))
            self.cache.check_integrity()

    def _request(self, length: int) -> Request:
        self.count += 1
        return Request(f"r{self.count}", [1] * length, SamplingParams(), frozenset(), 0, 0.0, number=self.count)

    def _add(self, request: Request) -> None:
        self.requests.append(request)
        self.written.setdefault(request.id, [])

    def _resident(self) -> list[Request]:
        return [request for request in self.requests if request.id in self.cache.tables]

    def _slots(self, request: Request, count: int) -> list[int]:
        table, size = self.cache.block_table(request), self.cache.block_size
        return [table[position // size] * size + position % size for position in range(count)]

    def _write(self, request: Request, upto: int) -> None:
        self._move(self.memory, self.memory, self.cache.take_copies())
        for slot in self._slots(request, upto)[request.num_computed_tokens :]:
            self.memory[slot] = request.id
            self.written[request.id].append(request.id)
        self.cache.mark_computed(request, upto)

    def _move(self, source: dict[int, str], target: dict[int, str], pairs: BlockCopies) -> None:
        size = self.cache.block_size
        slots = [(a * size + i, b * size + i) for a, b in pairs for i in range(size)]
        target.update({to: content for at, to in slots if (content := source.get(at)) is not None})


TestPool = PoolMachine.TestCase
TestPool.settings = SETTINGS
TestCache = CacheMachine.TestCase
TestCache.settings = SETTINGS


def test_a_block_is_never_released_twice_nor_shared_while_free() -> None:
    pool = BlockPool(2)
    [block] = pool.take(1)
    pool.release([block])
    with pytest.raises(RuntimeError, match="released twice"):
        pool.release([block])
    with pytest.raises(RuntimeError, match="is free"):
        pool.share([block])
    assert pool.num_free == 2


@pytest.mark.parametrize("damage", ["leak", "theft", "short table", "unknown"])
def test_check_integrity_finds_every_damage(damage: str) -> None:
    cache = PagedCache(8, 4)
    for name in "ab":
        request = Request(name, [1] * 6, SamplingParams(), frozenset(), 0, 0.0)
        assert cache.grow(request, 6)
        cache.mark_computed(request, 6)
    cache.check_integrity()
    if damage == "leak":
        cache.pool.take(1)
    elif damage == "theft":
        cache.tables["a"][0] = cache.tables["b"][0]
    elif damage == "short table":
        cache.pool.release([cache.tables["a"].pop()])
    else:
        del cache._stored["a"]
    with pytest.raises(AssertionError):
        cache.check_integrity()
