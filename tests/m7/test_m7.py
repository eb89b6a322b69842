"""The engine over 4-bit weights: which ones it takes, and that its tokens are m0's on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.contestant import Setting
from benchmarks.stage_contestant import StageContestant
from benchmarks.workloads import find_size
from common import Engine, SamplingParams, UserError
from common.config import DEFAULT_MODEL
from common.models.linear import Linear
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.quantized_folder import fused_names
from stages.m7_gptq.checkpoint.baselines import RTN
from stages.m7_gptq.checkpoint.quantize import quantize, short_name
from stages.m7_gptq.fast.cpu_codes import CpuInt4Linear
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.depth import by_depth
from tests.engine_checks import TOKEN_BYTES, exactly, prompts_of, serve, tokens
from tests.helpers import all_logits, exact_eight_bit_head, rounded
from tests.m7.conftest import Frozen, GetMade

Build = Callable[..., Engine]
CPU = torch.device("cpu")
PROMPTS = prompts_of((7, 1, 30, 2, 16, 9))
OUTPUTS = [exactly(count) for count in (9, 20, 3, 12, 16, 24)]


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"desc_act": True}, {"bits": 8}, {"group_size": -1}], ids=str
)
def test_tokens_are_those_of_the_dequantised_checkpoint(
    build: Build, made: GetMade, model: str, options: dict[str, object]
) -> None:
    folder = str(made(model, **options).folder)
    engine = build("m7", model=folder, block_size=4, kv_cache_memory=48 * TOKEN_BYTES, max_num_seqs=4)
    m0 = build("m0", model=folder)
    m0.runner.model.head = exact_eight_bit_head(m0.runner.model)
    assert tokens(serve(engine, PROMPTS, OUTPUTS)) == tokens(m0.generate(PROMPTS, OUTPUTS))


def test_the_embedded_model_answers_as_m0_on_its_dequantised_weights(build: Build, tmp_path: Path) -> None:
    settings = RTN(search=False)  # seconds instead of minutes: the weights need not be good ones
    folder = quantize(DEFAULT_MODEL, settings, tmp_path / "made", progress=False).folder
    prompts = ["The capital of France is", "1 2 3"]
    params = SamplingParams(max_tokens=by_depth(4, 8))
    with build("m7", model=str(folder), max_model_len=64) as engine:
        got = [output.text for output in engine.generate(prompts, params)]
        del engine.runner.model.layers[:]
    with build("m0", model=str(folder), max_model_len=64) as engine:
        engine.runner.model.head = exact_eight_bit_head(engine.runner.model)
        assert got == [output.text for output in engine.generate(prompts, params)]


def test_a_model_that_is_not_quantised_is_quantised_once(
    build: Build, frozen: Frozen, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr("stages.m7_gptq.checkpoint.quantize.calibration_tokens", lambda tokenizer, text: token_ids)
    first = build("m7", model=frozen(TINY[0])).generate(PROMPTS, OUTPUTS)
    [folder] = [path for path in (tmp_path / "gptq").iterdir() if path.is_dir()]
    assert folder.name.endswith(short_name(Settings()))
    written = (folder / "config.json").stat().st_mtime_ns
    again = "stages.m7_gptq.checkpoint.baselines.calibrate_layers"
    monkeypatch.setattr(again, lambda *_: pytest.fail("it is quantised again"))
    assert tokens(build("m7", model=frozen(TINY[0])).generate(PROMPTS, OUTPUTS)) == tokens(first)
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_random_weights_are_rounded_and_the_record_says_so(build: Build) -> None:
    engine = build("m7", dtype="bf16")
    assert isinstance(engine.runner.model.layers[0].qkv_proj, CpuInt4Linear)
    setting = Setting.of(TINY[0], "bf16", "cpu", find_size("mixed", None, "quick"), {})
    contestant = StageContestant("m7", setting)
    assert contestant.note is not None and "rounded to nearest" in contestant.note
    contestant.close()
    contestant = StageContestant("m6", setting)
    assert "rounded" not in str(contestant.note)
    contestant.close()


@pytest.mark.parametrize("model", TINY)
def test_float32_multiplies_by_the_dequantised_weights(build: Build, model: str) -> None:
    engine = build("m7", model=model, fused_kernels=False)  # for the same bits
    assert all(isinstance(layer.down_proj, Linear) for layer in engine.runner.model.layers)
    assert torch.equal(all_logits(engine.runner.model, [5, 6, 7]), all_logits(rounded(model), [5, 6, 7]))
    assert engine.note is not None and "dequantised" in engine.note


def test_other_stages_run_the_weights_of_the_checkpoint(build: Build, saved: Path) -> None:
    """They take its dequantised weights, and say so."""
    engine = build("m6", model=str(saved))
    folder = GPTQFolder(saved)
    for name, projection in fused_names(1).items():
        expected = torch.cat([folder.quantized(n).dequantize() for n in projection])
        assert torch.equal(getattr(engine.runner.model.layers[1], name).weight, expected)
    assert engine.note == "dequantised at load from 4-bit GPTQ, groups of 32: no bytes are saved"
    assert build("m7", model=str(saved), dtype="bf16", head_bits=16).note is None


def test_layers_without_a_kernel_are_multiplied_in_full_and_a_note_says_so(build: Build, made: GetMade) -> None:
    engine = build("m7", model=str(made(bits=8, method="rtn").folder), dtype="bf16")
    assert engine.note is not None and engine.note.startswith("8 of 8 projections are multiplied unquantised")


def test_a_damaged_folder_is_refused(build: Build, folder: Path) -> None:
    """Must not be quantised instead."""
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"safetensors (is truncated or damaged|cannot be read)"):
        build("m7", model=str(folder))
