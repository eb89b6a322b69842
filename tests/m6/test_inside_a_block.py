"""Matches that end inside a block: which block the tree finds, and when copying it pays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common import Engine
from stages.m6_prefix_caching.prefix_index import Tokens
from stages.m6_prefix_caching.radix.radix_index import RadixIndex
from tests.engine_checks import TOKEN_BYTES, Driver, exactly
from tests.fake_runner import without_model
from tests.m6.checks import words

Build = Callable[..., Engine]


@pytest.mark.parametrize(
    ("tokens", "block", "common"),
    [
        ((1, 2, 5, 7), 0, 3),  # behind the closest one
        ((1, 2, 8, 7), 1, 3),  # before it
        ((1, 2, 8), 1, 3),  # the end of a prompt: fewer tokens than a block has
        ((9, 9, 9, 9), 2, 1),  # behind all
        ((0, 2, 5, 0), 0, 0),  # before all
    ],
)
def test_the_closest_block_shares_the_most_tokens(tokens: Tokens, block: int, common: int) -> None:
    index = RadixIndex()
    root = index.root(None)
    entries = [index.add(root, own, at) for at, own in enumerate([(1, 2, 5, 0), (1, 2, 8, 9), (9, 0, 0, 0)])]
    assert index.closest(root, tokens, before=1) == (entries[block], common)


def test_a_block_that_the_same_plan_registers_is_never_copied() -> None:
    """Copies run before the step computes anything."""
    index = RadixIndex()
    root = index.root(None)
    entry = index.add(root, (1, 2), 0)
    assert entry is not None
    entry.step = 5
    assert index.closest(root, (1,), before=5) is None
    assert index.closest(root, (1,), before=6) == (entry, 1)


@pytest.mark.parametrize(("shared", "cached"), [(9, 8), (10, 10), (15, 15), (16, 16), (17, 16)])
def test_less_than_a_quarter_of_a_block_is_never_copied(build: Build, shared: int, cached: int) -> None:
    """Blocks of 8 tokens: a copy for one token costs more than it saves, one for two does not."""
    driver = Driver(without_model(build("m6", block_size=8, prefix_index="radix")))
    driver.add(words(0, 24), exactly(1))
    driver.drain()
    [request] = driver.add(words(0, shared) + words(2, 6), exactly(1))
    driver.drain()
    assert request.num_cached_tokens == cached


def test_an_index_that_was_emptied_remembers_no_root(build: Build) -> None:
    index = RadixIndex()
    root = index.root("mine")
    index.add(root, (1, 2), 0)
    index.clear()
    assert index.root("mine") is not root and index.find(index.root("mine"), (1, 2)) is None


def test_hits_and_blocks_are_counted(build: Build) -> None:
    """Each request that starts with a block is one hit, of that block and of those before it."""
    engine = without_model(build("m6", block_size=4))
    driver = Driver(engine)
    for prompt in (words(0, 9), words(0, 9), words(0, 6), words(2, 6)):
        driver.add(prompt, exactly(1))
        driver.drain()
    nodes = {node.tokens: node.hits for node in engine.scheduler.cache.prefix_tree()}
    assert nodes == {tuple(words(0, 4)): 2, tuple(words(0, 8)[4:]): 1, tuple(words(2, 4)): 0}
    assert engine.metrics()["blocks_shared"] == 3


def test_a_copy_never_takes_a_block_that_the_prompt_needs(build: Build) -> None:
    """The whole pool is what the prompt needs: the source of a copy, kept until it is made, would be one too many."""
    driver = Driver(without_model(build("m6", block_size=4, prefix_index="radix", kv_cache_memory=4 * 4 * TOKEN_BYTES)))
    driver.add(words(0, 12), exactly(1))
    driver.drain()
    [request] = driver.add(words(0, 10) + words(2, 3), exactly(1))
    driver.drain()
    assert request.num_cached_tokens == 8
