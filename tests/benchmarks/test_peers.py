"""The peers generate what was asked for, and on the same weights the same tokens as ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from benchmarks.contestant import Setting
from benchmarks.peers import build_peer
from benchmarks.worker import check_lengths
from benchmarks.workloads import find_size
from common import SamplingParams
from common.errors import UserError

MODEL = "random:tiny-qwen3"


def setting(model: str = MODEL) -> Setting:
    return Setting.of(model, "fp32", "cpu", find_size("mixed", None, "quick"), {})


@pytest.mark.parametrize("peer", ["transformers-static", "transformers-continuous"])
def test_transformers_greedy_tokens_equal_ours(peer: str) -> None:
    requests = find_size("mixed", None, "quick").requests(512, run=1)
    counted: list[int] = []
    contestant: Any = build_peer(peer, setting())
    try:
        run = contestant.run(requests, counted.append)
    finally:
        contestant.close()
    check_lengths(requests, run)
    assert sum(counted) == sum(r.max_tokens for r in requests)
    assert all(t.ttft > 0 and all(gap >= 0 for gap in t.itl) for t in run.timelines)
    with stages.build("m1", model=MODEL, dtype="fp32", device="cpu", max_num_seqs=4, max_model_len=64) as engine:
        params = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        ours = engine.generate([r.prompt for r in requests], params)
    assert contestant.outputs == [output.token_ids for output in ours]


def test_quantised_folders_in_peers(quantised_folder: Path) -> None:
    """transformers gets the dequantised weights and says so; llama.cpp says why not."""
    requests = find_size("mixed", None, "quick").requests(512, run=1)
    contestant: Any = build_peer("transformers-static", setting(str(quantised_folder)))
    contestant.run(requests, lambda tokens: None)
    contestant.close()
    assert "dequantised at load from 4-bit GPTQ" in contestant.note
    with stages.build(
        "m7", model=str(quantised_folder), dtype="fp32", device="cpu", max_num_seqs=4, max_model_len=64, head_bits=16
    ) as engine:
        params = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        ours = engine.generate([r.prompt for r in requests], params)
    assert contestant.outputs == [output.token_ids for output in ours]
    if importlib.util.find_spec("llama_cpp") is not None:
        with pytest.raises(UserError, match="runs GGUF files only"):
            build_peer("llama.cpp", setting(str(quantised_folder)))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python belongs to the extra peers")
def test_llama_cpp_refills_its_sequences_and_batching_changes_nothing() -> None:
    torch.set_num_threads(1)
    from benchmarks.peers.llama_cpp import LlamaCpp

    requests = find_size("mixed", None, "quick").requests(49152, run=1)
    peer = LlamaCpp(setting("smollm2-135m-instruct"))
    try:
        run = peer.run(requests, lambda tokens: None)
        batched = peer.outputs
        check_lengths(requests, run)
        assert run.metrics["peak_running"] == 4
        alone = []
        for request in requests[:3]:
            peer.run([request], lambda tokens: None)
            alone += peer.outputs
    finally:
        peer.close()
    first_tokens = [tokens[0] for tokens in batched[:3]]
    assert first_tokens == [tokens[0] for tokens in alone]


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    monkeypatch.delitem(__import__("sys").modules, "benchmarks.peers.llama_cpp", raising=False)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        build_peer("llama.cpp", setting())


def test_a_generation_that_is_too_short_is_an_error() -> None:
    from benchmarks.recipes import BenchRequest
    from benchmarks.record import Run, Timeline

    with pytest.raises(RuntimeError, match="request 0 got 1 tokens instead of 2"):
        check_lengths([BenchRequest([1], 2)], Run(0.0, [Timeline(0.0, [1.0])]))
