"""The peers generate what was asked for, and on the same weights the same tokens as ours."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from benchmarks.contestant import Setting
from benchmarks.peers import build_peer
from benchmarks.peers.gguf_model import write_gguf
from benchmarks.peers.hf_model import our_tensors
from benchmarks.worker import check_lengths
from benchmarks.workloads import find_size
from common import SamplingParams
from common.errors import UserError
from common.models.rope import Llama3Scaling
from common.models.sources.gguf_file import GGUFFile
from common.models.sources.random_weights import PRESETS

MODEL = "random:tiny-qwen3"
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python belongs to the extra peers"
)


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
            build_peer("llama.cpp Q4_0", setting(str(quantised_folder)))


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "made"), [("Q4_0", "made of SmolLM2"), ("BF16", "made of SmolLM2"), ("Q4_1", "runs SmolLM2")]
)
def test_llama_cpp_refills_its_sequences_and_batching_changes_nothing(
    kind: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each format is made of the model's own file, once, unless it is that of the file."""
    torch.set_num_threads(1)
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    requests = find_size("mixed", None, "quick").requests(49152, run=1)
    peer: Any = build_peer(f"llama.cpp {kind}", setting("smollm2-135m-instruct"))
    assert made in peer.note and "compiled for" in peer.note
    written = list(tmp_path.rglob("*.gguf"))
    assert len(written) == (kind != "Q4_1") and all(path.name.endswith(f"-{kind}.gguf") for path in written)
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
    monkeypatch.setattr("benchmarks.peers.gguf_model._quantize", None)  # not again
    build_peer(f"llama.cpp {kind}", setting("smollm2-135m-instruct")).close()


@needs_llama_cpp
def test_a_format_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))

    def full(source: bytes, target: bytes, _: Any) -> int:
        Path(target.decode()).write_bytes(b"GGUF half")
        return 1

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", full)
    with pytest.raises(UserError, match=r"cannot write .*Q4_1.gguf in another format.*FOLOVLLM_CACHE"):
        build_peer("llama.cpp Q4_0", setting("smollm2-135m-instruct"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@needs_llama_cpp
def test_a_row_says_for_which_instructions_its_build_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import llama_cpp as peer

    for info, said in (
        (
            b"CPU : AVX = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | AVX512_BF16 = 0 | F16C = 1 |",
            "AVX2, AVX512_VNNI",
        ),
        (b"CPU : ", "any processor"),
    ):
        monkeypatch.setattr(peer.llama_cpp, "llama_print_system_info", lambda info=info: info)
        assert peer.instructions() == f"compiled for {said}"


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "scaled"])
def test_random_weights_in_a_gguf_file_are_ours(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back as any GGUF file: the order of rows, the names, the scaling of positions."""
    scaled = replace(PRESETS["tiny-llama"], rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192))
    monkeypatch.setitem(PRESETS, "scaled", scaled)
    given = Setting.of(f"random:{model}", "bf16", "cpu", find_size("single", None, "quick"), {})
    write_gguf(given, tmp_path / "x.gguf")
    source, tensors = our_tensors(given)
    found = GGUFFile(tmp_path / "x.gguf")
    same: dict[str, Any] = {"name": "", "eos_token_ids": (), "rms_norm_eps": 1.0}
    assert replace(found.config, **same) == replace(source.config, **same)
    assert found.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps)  # the file has it in float32
    for name, tensor in tensors.items():
        assert torch.equal(found.read(name, tuple(tensor.shape)), tensor.float()), name


@needs_llama_cpp
def test_llama_cpp_on_random_weights_makes_our_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from 4 bits made of them; in bf16, so that near ties may fall otherwise."""
    torch.set_num_threads(1)
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    requests = find_size("mixed", None, "quick").requests(512, run=1)
    with stages.build("m1", model=MODEL, dtype="fp32", device="cpu", max_num_seqs=4, max_model_len=64) as engine:
        ours = engine.generate([r.prompt for r in requests], SamplingParams(max_tokens=1, ignore_eos=True))
    for kind, least in (("BF16", 7), ("Q4_0", 1)):
        peer: Any = build_peer(f"llama.cpp {kind}", setting())
        peer.run(requests, lambda tokens: None)
        peer.close()
        pairs = zip(peer.outputs, ours, strict=True)
        assert sum(theirs[0] == own.token_ids[0] for theirs, own in pairs) >= least


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    monkeypatch.delitem(__import__("sys").modules, "benchmarks.peers.llama_cpp", raising=False)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        build_peer("llama.cpp Q4_0", setting())


def test_a_generation_that_is_too_short_is_an_error() -> None:
    from benchmarks.recipes import BenchRequest
    from benchmarks.record import Run, Timeline

    with pytest.raises(RuntimeError, match="request 0 got 1 tokens instead of 2"):
        check_lengths([BenchRequest([1], 2)], Run(0.0, [Timeline(0.0, [1.0])]))
