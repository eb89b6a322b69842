"""CUDA graphs on a GPU: the same greedy tokens as step by step, for every shape and length."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

import stages
from common import Engine, SamplingParams
from common.execution.cuda_graphs import CudaRecorder, Recording, step_shapes
from common.execution.graph_inputs import MAX_PROMPTS
from tests.conftest import TINY
from tests.engine_checks import CHUNKED, PAGED, TOKEN_BYTES, exactly, prompts_of, serve, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Build = Callable[..., Engine]
CAPTURING = [stage for stage in PAGED if stages.number(stage) >= 4]
GPU = {"device": "cuda", "overlap": False}


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 20])
@pytest.mark.parametrize("stage", CAPTURING)
def test_a_replayed_step_equals_an_eager_one(build: Build, stage: str, max_num_seqs: int, overlap: bool) -> None:
    prompts = prompts_of([7, 1, 130, 2, 65, 16, 300, 40, 3, 11] * 3)
    params = [exactly(5 + 7 * i % 60) for i in range(len(prompts))]
    options = {**GPU, "max_num_seqs": max_num_seqs, "kv_cache_memory": 20 * 512 * TOKEN_BYTES}
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, params))
    engine = build(stage, **{**options, "overlap": overlap})
    assert engine.runner.graphs is not None and engine.runner.graphs.shapes == step_shapes(max_num_seqs, 2048)
    assert tokens(serve(engine, prompts, params)) == expected


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("chunk", [1, 64, 300, 2048])
@pytest.mark.parametrize("stage", CHUNKED)
def test_chunks_of_prompts_in_graphs_change_no_token(build: Build, stage: str, chunk: int, overlap: bool) -> None:
    """Chunks that do not sample, several prompts in a step, and hits: each prompt comes twice, and once longer."""
    prompts = prompts_of((150, 3, 65, 64, 1, 380, 17, 200, 256))
    prompts = [*prompts, *prompts, *[prompt + prompt[:5] for prompt in prompts]]
    params = [exactly(3 + 5 * i % 37) for i in range(len(prompts))]
    options = {**GPU, "prefill_chunk_size": chunk, "kv_cache_memory": 20 * 512 * TOKEN_BYTES}
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, params))
    engine = build(stage, **{**options, "overlap": overlap})
    assert tokens(serve(engine, prompts, params)) == expected
    if stage == "m6":
        assert engine.metrics()["tokens_saved"]


@pytest.mark.parametrize("stage", CAPTURING)
def test_steps_that_fit_no_graph_change_no_token(build: Build, stage: str) -> None:
    """More prompts in a step than a graph has room for, and a prompt that m4 computes whole, over the budget."""
    prompts = prompts_of([2] * (MAX_PROMPTS + 3) + [150, 4, 30])
    options = {**GPU, "max_num_seqs": 40, "max_num_batched_tokens": 80, "kv_cache_memory": 20 * 512 * TOKEN_BYTES}
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, exactly(8)))
    for overlap in (False, True):
        assert tokens(serve(build(stage, **{**options, "overlap": overlap}), prompts, exactly(8))) == expected


@pytest.mark.parametrize("swap_space", [0, 10**6], ids=["recompute", "swap"])
@pytest.mark.parametrize("stage", CAPTURING)
def test_padding_rows_change_no_token(build: Build, stage: str, swap_space: int) -> None:
    """Must not write into a request's block."""
    options = {**GPU, "block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES, "swap_space": swap_space}
    prompts, params = prompts_of((4, 1, 9, 7, 3, 8, 2, 12)), [exactly(n) for n in (25, 30, 20, 22, 29, 24, 31, 33)]
    expected = tokens(build(stage, cuda_graphs=False, **options).generate(prompts, params))
    for overlap in (False, True):
        engine = build(stage, **{**options, "overlap": overlap})
        assert tokens(serve(engine, prompts, params)) == expected
        assert engine.metrics()["preemptions"]


@pytest.mark.parametrize("stage", CAPTURING)
def test_sampling_beside_greedy_rows_gives_the_tokens_of_eager_steps(build: Build, stage: str) -> None:
    params = [
        exactly(12),
        exactly(6, temperature=1.2, seed=3, top_p=0.9),
        exactly(8, logprobs=2),
        exactly(7, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(max_tokens=9, min_tokens=5),
    ]
    prompts = prompts_of((7, 1, 30, 2, 5))
    options = {**GPU, "kv_cache_memory": 16 * 512 * TOKEN_BYTES}
    results = [
        tokens(build(stage, **{**options, **more}).generate(prompts, params))
        for more in ({"cuda_graphs": False}, {}, {"overlap": True})
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("stage", CAPTURING)
def test_two_engines_side_by_side_change_no_token(build: Build, stage: str) -> None:
    """They must not share the memory of a graph."""
    options = {**GPU, "kv_cache_memory": 16 * 512 * TOKEN_BYTES}
    one, two = (build(stage, seed=seed, **options) for seed in (1, 2))
    prompts = prompts_of((7, 1, 30))
    apart = [tokens(engine.generate(prompts, exactly(20))) for engine in (one, two)]
    streams = [engine.stream(prompts, exactly(20)) for engine in (one, two)]
    last: list[dict[str, list[int]]] = [{}, {}]
    for outputs in zip(*streams, strict=True):
        for seen, output in zip(last, outputs, strict=True):
            seen[output.request_id] = output.token_ids
    assert [list(seen.values()) for seen in last] == apart


def test_an_engine_that_is_garbage_is_freed_before_the_next_capture(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs and pinned memory are freed by calls that CUDA forbids while it captures. Must not end that
    capture."""
    options = {"model": TINY[0], "device": "cuda", "kv_cache_memory": 20 * 512 * TOKEN_BYTES, "max_num_seqs": 8}
    record = CudaRecorder.__call__

    def collecting(self: CudaRecorder, function: Callable[[], None]) -> Recording:
        def and_collect() -> None:
            function()
            if torch.cuda.is_current_stream_capturing():
                gc.collect()  # as if it were this allocation after which the collector runs

        return record(self, and_collect)

    gc.disable()  # until then
    try:
        engine = stages.build(CAPTURING[-1], **options)
        engine.generate(prompts_of([7, 1, 30]), exactly(8))
        engine.itself = engine  # type: ignore[attr-defined]
        gone = weakref.ref(engine)
        del engine
        assert gone() is not None
        monkeypatch.setattr(CudaRecorder, "__call__", collecting)
        build(CAPTURING[-1], **options)
        assert gone() is None
    finally:
        gc.enable()
