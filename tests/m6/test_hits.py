"""Whatever the cache finds, the tokens are those of a model that computes everything: float32, greedy, every offset."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common import Engine
from tests.conftest import TINY
from tests.engine_checks import TOKEN_BYTES, assert_empty, exactly, prompts_of, serve
from tests.m6.checks import INDICES, alone, ask, on_other_weights, words

Build = Callable[..., Engine]
SIZE = 4


@pytest.mark.parametrize("length", [1, 4, 11, 12, 13])
@pytest.mark.parametrize("index", INDICES)
def test_a_hit_of_any_length_changes_no_token(build: Build, index: str, length: int) -> None:
    """A prompt, and prompts of each length up to its own and beyond that share 0, 1, 2, ... of its first tokens."""
    engine = build("m6", block_size=SIZE, prefix_index=index)
    first = words(0, length)
    for shared in range(length + 1):
        for more in (0, 1, SIZE):
            prompt = first[:shared] + words(2, more)
            if not prompt:
                continue
            engine.reset_prefix_cache()
            assert ask(engine, first) == 0
            usable = min(shared, len(prompt) - 1, (length + 2) // SIZE * SIZE)  # 2 of the 3 outputs are stored
            expected = usable if index == "radix" else usable // SIZE * SIZE
            assert ask(engine, prompt) == expected, f"{shared} shared, {more} more"


@on_other_weights
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("index", INDICES)
def test_a_chat_that_grows_finds_its_earlier_turns(build: Build, index: str, model: str) -> None:
    """Each turn begins with the last one, answer included: generated blocks are found too. Must not compute them
    again."""
    engine = build("m6", model=model, block_size=SIZE, prefix_index=index)
    chat = words(0, 6)
    for turn in range(5):
        cached = ask(engine, chat, count=5)
        stored = len(chat) - 3 - turn % 3  # the chat before: its last token's K and V were never computed
        if turn:
            assert cached >= (stored - 1) // SIZE * SIZE > 0
        chat = chat + alone(engine, chat, 5) + words(3, 1 + (turn + 1) % 3)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("index", INDICES)
def test_chunk_sizes_change_no_token(build: Build, index: str, chunk: int) -> None:
    engine = build("m6", block_size=SIZE, prefix_index=index, prefill_chunk_size=chunk, max_num_seqs=4)
    prompts = [words(0, shared) + words(n, more) for n, (shared, more) in enumerate([(9, 3), (9, 0), (13, 2), (8, 1)])]
    prompts += [prompts[0], prompts[2][:-1], words(0, 30)]
    for _ in range(2):
        outputs = serve(engine, prompts, exactly(6))
        assert [o.token_ids for o in outputs] == [alone(engine, p, 6) for p in prompts]
    assert engine.metrics()["tokens_saved"] > 0  # type: ignore[operator]


@on_other_weights
@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
@pytest.mark.parametrize("index", INDICES)
def test_eviction_and_preemption_with_hits_change_no_token(build: Build, index: str, swap_space: int) -> None:
    memory = {"kv_cache_memory": 48 * TOKEN_BYTES, "swap_space": swap_space}
    engine = build("m6", block_size=SIZE, prefix_index=index, **memory)
    prompts = [words(0, 9) + tail for tail in prompts_of([1, 3, 7, 2, 4, 12], seed=5)] + prompts_of([3, 17])
    lengths = [25, 18, 20, 22, 24, 16, 30, 20]
    for _ in range(2):
        outputs = serve(engine, prompts, [exactly(n) for n in lengths], aborts={3: [4]})
        for prompt, count, output in zip(prompts, lengths, outputs, strict=True):
            assert output.token_ids == alone(engine, prompt, count)[: len(output.token_ids)]
            assert len(output.token_ids) == count or output.finish_reason == "abort"
    metrics = engine.metrics()
    assert min(metrics["preemptions"], metrics["evictions"], metrics["tokens_saved"]) > 3  # type: ignore[type-var]
    assert bool(metrics["swaps"]) == bool(swap_space)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("prompt", [7, 8, 9])
def test_samples_of_a_cached_prompt_are_those_without_a_cache(build: Build, index: str, prompt: int) -> None:
    """n > 1 with its prompt cached, in part or up to the last token."""
    params = exactly(9, n=3, temperature=1.0, seed=4)
    engine, without = build("m6", block_size=SIZE, prefix_index=index), build("m5", block_size=SIZE)
    without.runner.model = engine.runner.model  # m7 has other weights
    cold = serve(without, [words(0, prompt)], params)
    for cached in (0, (prompt - 1) // SIZE * SIZE):
        [output] = serve(engine, [words(0, prompt)], params)
        assert output.num_cached_tokens >= cached
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in cold[0].outputs]
    assert_empty(engine)


@pytest.mark.parametrize("index", INDICES)
def test_a_preempted_request_finds_its_own_blocks(build: Build, index: str) -> None:
    """Two grow until one gives way. No other takes its memory, so that it loses no token but the last; and the hit rate
    of prompts knows nothing of it."""
    engine = build("m6", block_size=SIZE, prefix_index=index, kv_cache_memory=8 * SIZE * TOKEN_BYTES)
    serve(engine, [words(0, 5), words(2, 5)], exactly(14))
    metrics = engine.metrics()
    assert metrics["preemptions"] == 1
    assert metrics["tokens_recovered"] >= 8 and metrics["tokens_saved"] == metrics["prefix_hit_rate"] == 0  # type: ignore[operator]
    assert metrics["computed_tokens"] < 2 * (5 + 13) + 14


@pytest.mark.parametrize("index", INDICES)
def test_the_index_never_counts_as_an_owner_of_a_shared_block(build: Build, index: str) -> None:
    """One request holds four blocks; the next one copies the half of the last (radix), which the index holds for it
    until the copy is made: shared by two requests are three blocks, and never more."""
    engine = build("m6", block_size=SIZE, prefix_index=index, max_num_seqs=2)
    engine.add_request(words(0, 16), exactly(9))
    engine.step()
    assert engine.metrics()["blocks_shared_peak"] == 0, "only its owner, and the index"
    engine.add_request(words(0, 14) + words(2, 3), exactly(2))
    engine.step()
    assert engine.metrics()["computed_tokens"] == 16 + 1 + (3 if index == "radix" else 5)
    assert (engine.metrics()["blocks_shared"], engine.metrics()["blocks_shared_peak"]) == (3, 3)
    while engine.has_unfinished:
        engine.step()
    assert engine.metrics()["blocks_shared_peak"] == 3
    engine.reset_metrics()
    assert engine.metrics()["blocks_shared_peak"] == 0


def test_figures_are_right_and_a_reset_clears_them(build: Build) -> None:
    engine = build("m6", block_size=SIZE)
    ask(engine, words(0, 10))
    ask(engine, words(0, 8) + words(2, 2))
    metrics = engine.metrics()
    assert (metrics["prefix_hit_rate"], metrics["tokens_saved"], metrics["evictions"]) == (8 / 20, 8, 0)
    assert (metrics["blocks_shared"], metrics["blocks_shared_peak"]) == (2, 0), "one after the other"
    assert metrics["blocks_cached"] == 3 + 1
    engine.reset_metrics()
    assert engine.metrics()["prefix_hit_rate"] is None and engine.metrics()["tokens_saved"] == 0
    assert build("m5").metrics()["prefix_hit_rate"] is None
    build("m5").reset_prefix_cache()  # nothing to forget, no error
