"""What a folder only claims is held against its files and the memory before anything of that size is made."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import EngineConfig, UserError
from common.models import load_for, load_model
from common.models.layers import SLICE, RotaryEmbedding, inverse_frequencies
from common.models.sources.random_weights import PRESETS
from common.text.json_file import read_json
from common.watch import peak_memory
from common.watch.peak_memory import ActivationPeak, require_memory
from tests.helpers import all_logits
from tests.models import fuzz, fuzz_folder, reference
from tests.variants import VARIANTS

CPU = torch.device("cpu")
PLAIN, TIED = "llama, 3 queries a KV head", "qwen2, tied"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

importlib.import_module("tests.variants.configs")
REFUSED = [name for name, made in VARIANTS.items() if name.startswith("config: ") and made.refused]
LIMITED = ("a terabyte of nothing", "weights of a terabyte", "a million shards")
"""A machine may not map them at all; and what takes long to write."""


def folder(path: Path, case: str = PLAIN, **changes: Any) -> str:
    reference.save(case, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


@pytest.mark.parametrize("name", [name for name in REFUSED if not any(part in name for part in LIMITED)])
def test_refused_at_once_in_one_line_and_little_memory(name: str, tmp_path: Path) -> None:
    model = VARIANTS[name].make(tmp_path)
    length = 64 if "--max-model-len" in VARIANTS[name].options else None
    before, start = fuzz.peak(), time.perf_counter()
    with pytest.raises(UserError, match=VARIANTS[name].refused) as caught:
        load_for(EngineConfig(model=str(model), device="cpu", max_model_len=length))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 2
    assert fuzz.peak() - before < 64 << 20


def test_mutated_folders_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    """200 of those that `python -m tests.models.fuzz` makes."""
    tally = fuzz.fuzz(fuzz_folder.Folders(), 200, 2, tmp_path)
    assert not tally.wrong, tally.wrong[:3]
    assert min(tally.outcomes["loads"], tally.outcomes["refused"]) > 30


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_of_positions_in_slices_is_the_whole(dtype: torch.dtype) -> None:
    config, rows = PRESETS["llama3-1b"], 2 * SLICE + 5
    table = RotaryEmbedding(config, dtype, CPU, rows).table
    angles = torch.outer(torch.arange(rows).float(), inverse_frequencies(config))
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    assert torch.equal(table, torch.stack((cos, sin), 1)[:, :, None].to(dtype))


def test_making_the_table_takes_no_more_than_it_once_more() -> None:
    config = PRESETS["llama3-1b"]
    with ActivationPeak(CPU) as peak:
        table = RotaryEmbedding(config, torch.bfloat16, CPU, 200_000).table
    assert table.nbytes == 200_000 * 2 * 64 * 2
    assert peak.bytes is None or peak.bytes < 1.5 * table.nbytes


def test_an_engine_has_as_many_positions_as_its_longest_request(tmp_path: Path) -> None:
    model = folder(tmp_path, max_position_embeddings=1_000_000)
    loaded = load_for(EngineConfig(model=model, device="cpu", max_model_len=100))
    assert (len(loaded.model.rotary.table), loaded.max_model_len) == (100, 100)
    assert len(load_model(model).rotary.table) == 65536
    loaded = load_for(EngineConfig(model=model, device="cpu"))
    assert len(loaded.model.rotary.table) == loaded.max_model_len == 131_072


def test_positions_that_nobody_asked_for_are_limited(tmp_path: Path) -> None:
    model = folder(tmp_path, max_position_embeddings=2**27)
    with pytest.raises(UserError, match=r"claims 134,217,728 positions, .* pass max_model_len"):
        load_for(EngineConfig(model=model, device="cpu"))
    load_for(EngineConfig(model=model, device="cpu", max_model_len=256))


def test_memory_that_is_not_there_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path)
    monkeypatch.setattr(peak_memory, "free_memory", lambda device: 200_000)
    with pytest.raises(UserError, match=r"its weights would take [\d,]+ bytes, and 200,000 are free on cpu: take"):
        load_model(model)
    load_model(model, dtype="bf16")
    with pytest.raises(UserError, match="a table of 256 positions would take 4"):
        require_memory("a table of 256 positions", 400_000, CPU)


# -- JSON and tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"a": ' + "9" * 5000 + "}", '"a"', "\x00", "{} x"])
def test_json_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_json_has_a_largest_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}" + " " * 100)
    assert read_json(tmp_path / "a.json") == {}
    with pytest.raises(UserError, match="more than 50 bytes"):
        read_json(tmp_path / "a.json", largest=50)


def with_tensors(path: Path, case: str, **more: Any) -> str:
    """more: functions of the stored tensors."""
    model = folder(path, case)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {k.replace("__", "."): make(tensors) for k, make in more.items()}, path / "model.safetensors")
    return model


@pytest.mark.parametrize(
    ("change", "used"),
    [
        (lambda weight: weight.clone(), False),
        (lambda weight: weight.flip(0), True),
        (lambda weight: weight.bfloat16(), True),
        (lambda weight: torch.cat((weight[:-1], weight[-1:] + 1)), True),
    ],
)
def test_a_stored_head_that_is_not_the_embedding_is_used(
    change: Any, used: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    model = with_tensors(tmp_path, TIED, lm_head__weight=lambda found: change(found[EMBEDDING]))
    ours = load_model(model)
    said = capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reference.assert_close(all_logits(ours, [3, 4]), reference.logits(theirs, [3, 4]))
    assert ours.config.tie_word_embeddings is not used
    assert ("lm_head.weight is used" in said) is used


def test_a_head_in_other_numbers_but_the_same_is_the_embedding(tmp_path: Path) -> None:
    model = folder(tmp_path, TIED)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors | {HEAD: tensors[EMBEDDING].float()}, tmp_path / "model.safetensors")
    assert load_model(model).config.tie_word_embeddings


def test_tensors_of_other_parts_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("score__weight", "v_head__summary__bias", "model__vision__weight", "rotary_emb__inv_freq")
    model = with_tensors(tmp_path, PLAIN, **dict.fromkeys(names, lambda _: torch.zeros(3)))
    capsys.readouterr()
    load_model(model)
    load_model(model)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count(f"{model}: its tensors model.vision.weight, score.weight, v_head.") == 1
    assert "inv_freq" not in said


@pytest.mark.parametrize("name", ["lm_head__bias", "model__norm__bias", "model__layers__3__mlp__up_proj__weight"])
def test_tensors_of_parts_that_it_has_are_refused(name: str, tmp_path: Path) -> None:
    model = with_tensors(tmp_path, PLAIN, **{name: lambda _: torch.zeros(48)})
    with pytest.raises(UserError, match=f"unexpected tensors {name.replace('__', '.')}"):
        load_model(model)


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    model = folder(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    load_model(model)
