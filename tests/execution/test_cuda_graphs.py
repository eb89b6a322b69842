"""Steps as graphs: a replay is the eager step, whatever the padding; shown with graphs that only pretend."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

import stages
from common import Engine, SamplingParams
from common.execution.cuda_graphs import padded_sizes, prompt_sizes, step_shapes
from common.execution.draws import KINDS
from common.execution.graph_inputs import MAX_PROMPTS, StepShape
from tests.conftest import TINY
from tests.engine_checks import CHUNKED, PAGED, TOKEN_BYTES, exactly, prompts_of, serve, tokens
from tests.fake_graphs import FakeGraph, FakeRecorder, fake_graphs
from tests.helpers import every_pair

__all__ = ["fake_graphs"]

Build = Callable[..., Engine]
CAPTURING = [stage for stage in PAGED if stages.number(stage) >= 4]
LENGTHS = (7, 1, 30, 2, 5, 16, 1, 40, 3, 11)
OUTPUTS = (9, 20, 3, 1, 12, 16, 2, 8, 15, 5)
PROMPTS = prompts_of(LENGTHS)
PARAMS = [exactly(n) for n in OUTPUTS]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (13, [1, 2, 4, 8, 13]),
        (24, [1, 2, 4, 8, 16, 24]),
        (256, [1, 2, 4, *range(8, 257, 8)]),
    ],
)
def test_max_num_seqs_itself_is_a_size(limit: int, sizes: list[int]) -> None:
    assert padded_sizes(limit) == sizes


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1]),
        (70, [64, 70]),
        (512, [64, 128, 256, 384, 512]),
        (2000, [64, 128, 256, 384, 512, 768, 1024, 1536, 2000]),
        (8192, [64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]),
    ],
)
def test_the_longest_step_is_a_size(limit: int, sizes: list[int]) -> None:
    assert prompt_sizes(limit) == sizes


@pytest.mark.parametrize(("most", "beside"), [(256, {8, 32, 128, 256}), (40, {8, 32, 40}), (3, {3})])
def test_prompts_are_computed_beside_no_more_than_four_times_the_rows_that_decode(most: int, beside: set[int]) -> None:
    """Prompts must not bring room for hundreds of decodes with them, however many tokens they have."""
    shapes = step_shapes(most, 2048)
    assert [shape.rows for shape in shapes] == sorted(shape.rows for shape in shapes)
    for count in (64, 128, 256, 384, 512, 768, 1024, 1536, 2048):
        assert {shape.decodes for shape in shapes if shape.prompt_tokens == count} == beside
    assert shapes[-1] == StepShape(most, 2048)


@cache
def eager(stage: str, prompts: Sequence[int], outputs: Sequence[int], **options: Any) -> list[list[int]]:
    """Step by step, kernel by kernel, with memory for all."""
    with stages.build(stage, cuda_graphs=False, **({"model": TINY[0], "device": "cpu"} | options)) as engine:
        return tokens(engine.generate(prompts_of(prompts), [exactly(n) for n in outputs]))


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize(("stage", "model", "max_num_seqs"), every_pair(CAPTURING, TINY, (1, 3, 10)))
def test_a_replayed_step_equals_an_eager_one(
    fake_graphs: type[FakeRecorder], build: Build, stage: str, model: str, max_num_seqs: int, overlap: bool
) -> None:
    options: dict[str, Any] = {"model": model, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 100}
    expected = eager(stage, LENGTHS, OUTPUTS, **options)
    engine = build(stage, overlap=overlap, **options)
    shapes = step_shapes(max_num_seqs, 100)
    assert fake_graphs.recordings == len(shapes) + len(KINDS) * len(padded_sizes(max_num_seqs))
    assert tokens(serve(engine, PROMPTS, PARAMS)) == expected
    assert fake_graphs.replays == 2 * engine.metrics()["steps"], "each step is two replays, with prompts or without"


@pytest.mark.parametrize(("stage", "chunk", "overlap"), every_pair(CHUNKED, (3, 70), (False, True)))
def test_chunks_of_prompts_in_graphs_change_no_token(
    fake_graphs: type[FakeRecorder], build: Build, stage: str, chunk: int, overlap: bool
) -> None:
    """Chunks that do not sample, several prompts in a step, and hits: each prompt comes twice, and once longer."""
    prompts = prompts_of((150, 3, 65, 64, 1, 90, 17))
    prompts = [*prompts, *prompts, *[prompt + prompt[:5] for prompt in prompts]]
    params = [exactly(3 + 5 * i % 17) for i in range(len(prompts))]
    options = {"overlap": overlap, "prefill_chunk_size": chunk, "max_num_batched_tokens": 80, "block_size": 4}
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, params))
    engine = build(stage, **options)
    assert tokens(serve(engine, prompts, params)) == expected
    assert engine.metrics()["steps"] < fake_graphs.replays <= 2 * engine.metrics()["steps"]
    if stage == "m6":
        assert engine.metrics()["tokens_saved"]


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("stage", CAPTURING)
def test_steps_that_fit_no_graph_change_no_token(
    fake_graphs: type[FakeRecorder], build: Build, stage: str, overlap: bool
) -> None:
    """More prompts in a step than a graph has room for, and a prompt that m4 computes whole, over the budget."""
    lengths = (2,) * (MAX_PROMPTS + 3) + (150, 4, 30)
    expected = eager(stage, lengths, (8,) * len(lengths), max_num_seqs=40, max_num_batched_tokens=80)
    engine = build(stage, overlap=overlap, max_num_seqs=40, max_num_batched_tokens=80)
    assert tokens(serve(engine, prompts_of(lengths), exactly(8))) == expected
    assert 0 < fake_graphs.replays < 2 * engine.metrics()["steps"]


@pytest.mark.parametrize(("stage", "swap_space", "overlap"), every_pair(CAPTURING, (0, 10**6), (False, True)))
def test_padding_rows_write_into_the_spare_block_only(
    fake_graphs: type[FakeRecorder], build: Build, stage: str, swap_space: int, overlap: bool
) -> None:
    """Every block that the manager knows is in use, and requests come and go: rows 5 ... 7 of 8 are padding. Padding
    must not write into a request's block."""
    options = {"block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES, "swap_space": swap_space, "overlap": overlap}
    options["max_num_batched_tokens"] = 64
    lengths, outputs = (4, 1, 9, 7, 3, 8, 2, 12), (25, 30, 20, 22, 29, 24, 31, 33)
    expected = eager(stage, lengths, outputs)
    engine = build(stage, **options)
    blocks = engine.runner.attention.kv.blocks
    assert blocks.shape[2] == engine.scheduler.cache.pool.num_blocks + 1
    assert tokens(serve(engine, prompts_of(lengths), [exactly(n) for n in outputs])) == expected
    assert engine.metrics()["preemptions"]
    # What padding rows of a prompt compute is anything, NaN too: it is never read.
    assert blocks[:, :, -1].ne(0).any(), "nothing was written into the spare block"


@pytest.mark.parametrize("stage", CAPTURING)
def test_sampling_beside_greedy_rows_gives_the_tokens_of_eager_steps(
    fake_graphs: type[FakeRecorder], build: Build, stage: str
) -> None:
    """Each step's graph of the draw is that of its most demanding row."""
    params = [
        exactly(12),
        exactly(6, temperature=1.2, seed=3, top_p=0.9),
        exactly(8, logprobs=2),
        exactly(7, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(max_tokens=9, min_tokens=5),
        exactly(10, n=3, temperature=0.8, seed=5),
    ]
    prompts = PROMPTS[: len(params)]
    results: list[list[list[int]]] = []
    for options in ({"cuda_graphs": False}, {}, {"overlap": True}):
        outputs = build(stage, max_num_batched_tokens=64, **options).generate(prompts, params)
        results.append([sample.token_ids for output in outputs for sample in output.outputs])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("stage", CAPTURING)
def test_steps_with_penalties_are_planned_ahead(fake_graphs: type[FakeRecorder], build: Build, stage: str) -> None:
    """What is drawn is counted where it is drawn, also in steps that no graph holds and after a preemption."""
    params = [exactly(25 + n, frequency_penalty=0.7, repetition_penalty=1.2, min_tokens=4) for n in range(8)]
    prompts = prompts_of((4, 1, 9, 7, 3, 8, 2, 12))
    options: dict[str, Any] = {"block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES, "max_num_batched_tokens": 16}
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, params))
    engine = build(stage, overlap=True, **options)
    for prompt, one in zip(prompts, params, strict=True):
        engine.add_request(prompt, one)
    engine.step()
    assert len(engine._planned) == 1
    assert tokens(serve(build(stage, overlap=True, **options), prompts, params)) == expected


@pytest.mark.parametrize("stage", CAPTURING)
def test_a_block_table_that_shrinks_or_grows_leaves_no_stale_block(
    fake_graphs: type[FakeRecorder], build: Build, stage: str
) -> None:
    """The same rows of the same tensors, for long contexts and then for short ones, and the other way round."""
    engine, lone = build(stage, block_size=2, max_num_batched_tokens=64), build(stage, cuda_graphs=False)
    for length in (90, 3, 60, 1):
        prompts = prompts_of((length, length + 1, 2), seed=length)
        alone = [lone.generate([p], exactly(9))[0].token_ids for p in prompts]
        assert tokens(engine.generate(prompts, exactly(9))) == alone


@pytest.mark.parametrize("stage", PAGED)
def test_nothing_is_captured_where_there_is_no_gpu(build: Build, stage: str) -> None:
    assert build(stage).runner.graphs is None


@pytest.mark.parametrize("stage", CAPTURING)
def test_graphs_keep_their_tensors_at_the_same_addresses(
    fake_graphs: type[FakeRecorder], build: Build, stage: str
) -> None:
    """The addresses that a real graph would read and write stay where they were. Must not allocate new ones at every
    step."""
    engine = build(stage, max_num_seqs=4, max_num_batched_tokens=64)
    graphs = engine.runner.graphs
    assert graphs is not None

    def addresses() -> list[int]:
        inputs = graphs._inputs
        batch = inputs.batch(graphs.shapes[-1])
        fixed = (batch.positions, batch.seq_lens, batch.slot_mapping, batch.query_start_loc, batch.block_tables)
        return [x.data_ptr() for x in (*fixed, batch.logit_indices, inputs.tokens, inputs._lookup, graphs._hidden)]

    before = addresses()
    engine.generate(PROMPTS[:4], exactly(5))
    assert addresses() == before
    assert graphs._inputs.batch(StepShape(4)).block_tables.dtype == torch.int32  # type: ignore[union-attr]


class Cycle:
    """Garbage that only the collector finds, as an engine is with a wrapped method."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_freed_before_a_capture_and_not_during_it(
    fake_graphs: type[FakeRecorder], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = weakref.ref(Cycle())
    seen: list[tuple[bool, bool]] = []
    asked: list[None] = []  # building may have run the collector anyway; the capture must not count on it

    def record(self: FakeRecorder, function: Callable[[], None]) -> FakeGraph:
        seen.append((gc.isenabled(), garbage() is not None))
        return FakeGraph(function)

    monkeypatch.setattr(fake_graphs, "__call__", record)
    monkeypatch.setattr(gc, "collect", lambda collect=gc.collect: (asked.append(None), collect())[1])
    build(CAPTURING[0], max_num_seqs=2, max_num_batched_tokens=64)
    assert seen and set(seen) == {(False, False)} and asked
    assert gc.isenabled()


def test_a_capture_that_fails_turns_the_collector_on_again(
    fake_graphs: type[FakeRecorder], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Must not leave it off."""

    def fail(self: FakeRecorder, function: Callable[[], None]) -> FakeGraph:
        raise RuntimeError("no memory")

    monkeypatch.setattr(fake_graphs, "__call__", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        build(CAPTURING[0])
    assert gc.isenabled()


def test_a_capture_leaves_a_collector_off_that_was_off(fake_graphs: type[FakeRecorder], build: Build) -> None:
    """Must not turn it on."""
    gc.disable()
    try:
        build(CAPTURING[0], max_num_seqs=2, max_num_batched_tokens=64)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("stage", CAPTURING[:1])
def test_consecutive_steps_are_prepared_in_different_buffers(
    fake_graphs: type[FakeRecorder], build: Build, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Must not be prepared where the copy of the step before reads: on a GPU that copy may not have begun yet."""
    engine = build(stage, max_num_seqs=4, max_num_batched_tokens=64)
    graphs = engine.runner.graphs
    assert graphs is not None
    inputs, places = graphs._inputs, list[int]()
    fill = inputs.fill

    def noting(*step: Any) -> None:
        fill(*step)
        places.append(inputs._staging[inputs._turn].data_ptr())

    monkeypatch.setattr(inputs, "fill", noting)
    engine.generate(PROMPTS[:4], exactly(9))
    assert len(places) > 5
    assert all(one != next_one for one, next_one in pairwise(places))
