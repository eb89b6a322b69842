"""Defects of published prefix caches, at least one test each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from common import Engine, UserError
from common.request import Request
from common.watch.trace import StepTrace
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.hash_index import HashIndex, chain_hash
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache
from stages.m6_prefix_caching.prefix_index import Entry
from tests.engine_checks import TOKEN_BYTES, Driver, check, exactly, serve
from tests.fake_runner import without_model
from tests.m6.checks import INDICES, alone, ask, words

Build = Callable[..., Engine]
SIZE = 4


# -- a 64-bit hash is trusted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3], ids=["one key for all", "two keys", "eight keys"])
def test_a_hash_is_never_trusted(build: Build, bits: int) -> None:
    """With a hash that collides all the time, tokens are right, and what has its place in the index is still found."""
    engine = build("m6", block_size=SIZE)
    engine.scheduler.cache.index = HashIndex(lambda key, tokens: chain_hash(key, tokens) % 2**bits)
    prompts = [words(n, 9) for n in range(5)] + [words(0, 8) + words(3, 5)]
    for _ in range(2):
        outputs = serve(engine, prompts, exactly(6))
        assert [o.token_ids for o in outputs] == [alone(engine, p, 6) for p in prompts]
    assert engine.metrics()["tokens_saved"] >= SIZE  # type: ignore[operator]


def test_the_parent_is_compared_too() -> None:
    """Equal tokens after different beginnings, one key for all."""
    index = HashIndex(lambda key, tokens: 0)
    here, there = index.root("here"), index.root("there")
    entry = index.add(here, (1, 2), block=0)
    assert entry is not None and index.find(here, (1, 2)) is entry
    assert index.find(there, (1, 2)) is None and index.find(here, (1, 3)) is None
    assert index.add(there, (1, 2), block=1) is None, "the place is taken"
    index.remove(entry)
    assert index.add(there, (1, 2), block=1) is not None


# -- only full, computed blocks; never the last token -----------------------------------------------------------------


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("length", [1, 4, 8, 9])
def test_the_last_token_is_never_taken_from_the_cache(build: Build, index: str, length: int) -> None:
    engine = build("m6", block_size=SIZE, prefix_index=index)
    assert ask(engine, words(0, length)) == 0
    assert ask(engine, words(0, length)) <= length - 1


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("length", range(1, 14))
def test_a_block_that_is_not_full_is_never_shared(build: Build, index: str, length: int, overlap: bool) -> None:
    """K and V of the last generated token are never computed: length + 2 tokens are stored."""
    engine = build("m6", block_size=SIZE, prefix_index=index, overlap=overlap)
    ask(engine, words(0, length), count=3)
    assert engine.metrics()["blocks_cached"] == (length + 2) // SIZE


@pytest.mark.parametrize("index", INDICES)
def test_a_block_is_shared_only_once_its_chunk_is_planned(build: Build, index: str) -> None:
    """A prompt of five blocks, computed three tokens at a time with a decode: a second one finds what is planned."""
    engine = build("m6", block_size=SIZE, prefix_index=index, prefill_chunk_size=3, max_num_seqs=4)
    engine.add_request(words(2, 3), exactly(30))
    engine.step()
    engine.add_request(words(0, 20), exactly(2))
    for planned in (3, 6, 9, 12, 15, 18, 20):
        engine.step()
        check(engine)
        assert engine.metrics()["blocks_cached"] == planned // SIZE + (3 + planned // 3) // SIZE


# -- duplicates, in one step and in steps apart -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 9, 12, 13])
@pytest.mark.parametrize("index", INDICES)
def test_identical_prompts_of_one_step_compute_their_common_blocks_once(build: Build, index: str, length: int) -> None:
    """The second one computes what is not a full block in front of the last token, and nothing of what the first one
    computes in the very same step."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    ids = [engine.add_request(words(0, length), exactly(7)) for _ in range(3)]
    engine.step()
    own = length - (length - 1) // SIZE * SIZE
    assert engine.metrics()["computed_tokens"] == length + 2 * own
    final = {}
    while engine.has_unfinished:
        final |= {output.request_id: output.token_ids for output in engine.step()}
        check(engine)
    assert [final[id] for id in ids] == [alone(engine, words(0, length), 7)] * 3


@pytest.mark.parametrize("index", INDICES)
def test_a_duplicate_is_replaced_in_its_table_before_it_is_freed(build: Build, index: str) -> None:
    """Two prompts of exactly two blocks: the second block is computed by both, and one copy stays once both know. The
    other must not be freed under a live table."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    for _ in range(2):
        engine.add_request(words(0, 8), exactly(6))
    engine.step()
    tables = engine.scheduler.cache.tables
    one, other = tables.values()
    assert one[0] == other[0] and one[1] != other[1]
    engine.step()
    assert one[1] == other[1] and one[2] != other[2], "adopted when it was computed, and not before"
    pool = engine.scheduler.cache.pool
    assert pool.num_blocks - pool.num_free == 4
    while engine.has_unfinished:
        engine.step()
        check(engine)


@pytest.mark.parametrize("index", INDICES)
def test_a_fork_keeps_the_block_that_its_parent_replaced(build: Build, index: str) -> None:
    """Samples of a prompt whose last block is a duplicate: each replaces it for itself."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    params = exactly(9, n=3, temperature=1.0, seed=1)
    roomy = build("m5", block_size=SIZE)
    roomy.runner.model = engine.runner.model  # m7 has other weights
    expected = serve(roomy, [words(0, 8), words(0, 8)], params)
    found = serve(engine, [words(0, 8), words(0, 8)], params)
    assert [[s.token_ids for s in o.outputs] for o in found] == [[s.token_ids for s in o.outputs] for o in expected]


# -- the free list ----------------------------------------------------------------------------------------------------


def test_removal_from_the_free_list_costs_the_same_at_any_length() -> None:
    """Blocks leave the middle of a long list of cached ones, and the number of Python lines run stays the same. Must
    not walk the list."""

    def lines(blocks: int) -> int:
        pool = BlockPool(blocks)
        taken = pool.take(blocks)
        for block in taken:
            pool.keep([block])
        pool.release(taken)
        count = 0

        def trace(*_: Any) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()  # under coverage there is one, which goes on afterwards
        sys.settrace(trace)
        try:
            pool.share([taken[blocks // 2]])
            pool.release([taken[blocks // 2]])
            pool.take(2)
        finally:
            sys.settrace(before)
        return count

    assert lines(10) == lines(1000)


def test_the_block_used_least_recently_is_evicted_first() -> None:
    """No stamps that could be stale: a block's place is where its last owner put it. Must not evict what was used
    lately."""
    evicted: list[int] = []
    pool = BlockPool(4, evicted.append)
    blocks = pool.take(4)
    for block in blocks:
        pool.keep([block])
    pool.release(blocks[::-1])  # of a table, the end comes first
    pool.share([blocks[0]])
    assert pool.num_free == 3 and pool.take(1) == [blocks[1]] == evicted
    pool.release([blocks[0]])
    assert pool.take(3) == [blocks[2], blocks[3], blocks[0]] == evicted[1:]
    pool.release(blocks[::-1])
    assert pool.take(4) == blocks[::-1] and len(evicted) == 4, "an evicted block is empty"


@pytest.mark.parametrize("index", INDICES)
def test_a_child_is_evicted_before_its_parent(build: Build, index: str) -> None:
    """Two prompts with a common block fill a pool of 6; new ones take the oldest leaf, then its parent."""
    engine = build("m6", block_size=SIZE, prefix_index=index, kv_cache_memory=6 * SIZE * TOKEN_BYTES)
    ask(engine, words(0, 12), count=1)
    ask(engine, words(0, 4) + words(2, 8), count=1)
    assert engine.metrics()["blocks_cached"] == 5
    ask(engine, words(3, 7), count=1)  # one empty block, one evicted: the end of the first prompt
    assert engine.metrics()["evictions"] == 1
    assert ask(engine, words(0, 13), count=1) == 8
    check(engine)


# -- failed admissions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", INDICES)
def test_a_prompt_that_waits_is_hashed_once(build: Build, index: str) -> None:
    """Must not be hashed as a whole at every failed admission."""
    engine = build("m6", block_size=SIZE, prefix_index=index, kv_cache_memory=24 * SIZE * TOKEN_BYTES)
    ask(engine, words(0, 40), count=1)
    engine.add_request(words(2, 30), exactly(40))
    engine.step()
    engine.add_request(words(0, 60), exactly(4))
    looked = 0
    cache = engine.scheduler.cache
    find = cache.index.find

    def counted(parent: Entry, tokens: tuple[int, ...]) -> Entry | None:
        nonlocal looked
        looked += 1
        return find(parent, tokens)

    cache.index.find = counted  # type: ignore[method-assign]
    per_step: list[int] = []
    while engine.metrics()["waiting"]:
        looked = 0
        engine.step()
        per_step.append(looked)
    assert len(per_step) > 20 and per_step[0] == 11 and max(per_step[1:-1]) == 1
    cache.index.find = find  # type: ignore[method-assign]
    while engine.has_unfinished:
        engine.step()
        check(engine)


@pytest.mark.parametrize(
    ("blocks", "others", "siblings", "admitted"),
    [(3, 0, 0, True), (2, 0, 0, False), (5, 1, 0, True), (4, 1, 0, False), (4, 0, 1, True), (3, 0, 1, False)],
)
def test_admission_leaves_room_to_grow(blocks: int, others: int, siblings: int, admitted: bool) -> None:
    """Two full blocks, one for the first new token; one more for each who runs, holding a block, and each sibling."""
    cache = PrefixPagedCache(blocks, SIZE, 0, HashIndex())

    def request(id: str, tokens: int) -> Request:
        return Request(id, words(0, tokens), exactly(1), frozenset(), 0, 0.0)

    for other in range(others):
        assert cache.grow(request(f"other {other}", SIZE), SIZE)
    newcomer = request("newcomer", 2 * SIZE)
    newcomer.siblings = [request(f"sibling {n}", 2 * SIZE) for n in range(siblings)]
    assert cache.can_admit(newcomer) is admitted


def test_free_blocks_count_once_at_admission(build: Build) -> None:
    """Cached blocks that a prompt shares are free no more once it starts: 8 blocks, 5 cached, a prompt of 9 blocks'
    worth of tokens must not start on the strength of both."""
    engine = build("m6", block_size=SIZE, kv_cache_memory=8 * SIZE * TOKEN_BYTES)
    ask(engine, words(0, 20), count=1)
    engine.add_request(words(2, 9), exactly(8))
    engine.step()
    engine.add_request(words(0, 20), exactly(2))  # 3 held and one more to come; 4 shared and 2 of its own
    engine.step()
    assert engine.metrics()["waiting"] == 1
    while engine.has_unfinished:
        engine.step()
        check(engine)
    assert engine.metrics()["preemptions"] == 0


# -- salts, resets, failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", INDICES)
def test_prompts_of_another_salt_can_never_be_probed(build: Build, index: str) -> None:
    engine = build("m6", block_size=SIZE, prefix_index=index)
    prompt = words(0, 13)
    assert ask(engine, prompt, cache_salt="mine") == 0
    assert ask(engine, prompt) == ask(engine, prompt, cache_salt="yours") == 0
    assert [ask(engine, prompt, cache_salt=salt) for salt in ("mine", "yours", None)] == [12, 12, 12]
    engine.add_request(prompt, exactly(3), cache_salt="one")
    engine.add_request(prompt, exactly(3), cache_salt="two")
    engine.reset_metrics()
    engine.step()
    assert engine.metrics()["computed_tokens"] == 26, "not in one step either"


def test_generate_and_stream_keep_the_salt(build: Build) -> None:
    engine, prompt = build("m6", block_size=SIZE), words(0, 13)
    for salt, cached in (("mine", 0), (None, 0), ("mine", 12), (None, 12)):
        [output] = engine.generate([prompt], exactly(1), cache_salt=salt)
        assert output.num_cached_tokens == cached
    assert [o.num_cached_tokens for o in engine.stream([prompt], exactly(1), cache_salt="yours")] == [0]


@pytest.mark.parametrize("stage", ["m0", "m1", "m5", "m6"])
def test_a_salt_that_is_no_text_is_refused(build: Build, stage: str) -> None:
    engine = build(stage)
    for salt in ("", 7, b"x"):
        with pytest.raises(UserError, match="cache_salt"):
            engine.add_request([1], exactly(1), cache_salt=salt)  # type: ignore[arg-type]
    engine.add_request([1], exactly(1), cache_salt="all stages take one")


def test_roots_of_old_salts_are_removed(build: Build) -> None:
    engine = build("m6", block_size=SIZE, kv_cache_memory=6 * SIZE * TOKEN_BYTES)
    for tenant in range(20):
        ask(engine, words(tenant % 5, 9), count=1, cache_salt=f"tenant {tenant}")
    assert len(engine.scheduler.cache.index._roots) <= 3


@pytest.mark.parametrize("index", INDICES)
def test_a_reset_leaves_nothing_to_find(build: Build, index: str) -> None:
    """Between runs, and under running requests, which register their blocks again."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    ask(engine, words(0, 13))
    engine.reset_prefix_cache()
    assert engine.metrics()["blocks_cached"] == 0
    ids = [engine.add_request(words(0, 13), exactly(9)) for _ in range(2)]
    final = {}
    for step in range(9):
        final |= {output.request_id: output for output in engine.step()}
        check(engine)
        if step in (0, 1, 4):
            engine.reset_prefix_cache()
            check(engine)
    assert [final[id].token_ids for id in ids] == [alone(engine, words(0, 13), 9)] * 2
    assert final[ids[0]].num_cached_tokens == 0 and ask(engine, words(0, 13)) in (0, 12)


@pytest.mark.parametrize("index", INDICES)
def test_blocks_of_a_step_that_failed_are_never_found(
    build: Build, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered when the step was planned, never computed."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    engine.add_request(words(0, 13), exactly(4))

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "submit", fail)
        with pytest.raises(RuntimeError, match="gone"):
            engine.step()
    while engine.has_unfinished:
        engine.step()
    assert engine.metrics()["blocks_cached"] == 0
    assert ask(engine, words(0, 13)) == 0


def test_a_block_is_registered_only_when_its_tokens_are_known(build: Build) -> None:
    """A driver that plans one step ahead: the token that fills the block is still in flight."""
    engine = without_model(build("m6", block_size=SIZE))
    driver = Driver(engine, ahead=True)
    [request] = driver.add(words(0, 3), exactly(7))
    cache = engine.scheduler.cache
    while engine.has_unfinished:
        driver.step()
        for entry in cache._entries.values():
            depth = cache.tables[request.id].index(entry.block) if request.id in cache.tables else 0
            if request.id in cache.tables:
                assert list(entry.tokens) == request.token_ids[depth * SIZE : (depth + 1) * SIZE]
    driver.drain()
    assert len(cache._entries) == 2


@pytest.mark.parametrize("index", INDICES)
def test_the_trace_says_what_was_cached(build: Build, index: str) -> None:
    engine = build("m6", block_size=SIZE, prefix_index=index, kv_cache_memory=6 * SIZE * TOKEN_BYTES)
    trace = engine.trace = StepTrace()
    for prompt in (words(0, 12), words(0, 12), words(2, 15)):
        ask(engine, prompt, count=2)
    chunks = [chunk for step in trace.steps for chunk in step.chunks]
    assert [c.cached for c in chunks if c.kind == "prefill"] == [0, 11 if index == "radix" else 8, 0]
    assert sum(step.evicted_blocks for step in trace.steps) == engine.metrics()["evictions"] > 0
