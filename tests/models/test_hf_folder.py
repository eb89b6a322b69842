"""Hugging Face folders: shards, and everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import EngineConfig, UserError
from common.models import load_for, load_model, load_tokenizer
from tests.helpers import all_logits
from tests.models import reference
from tests.test_cli import byte_tokenizer

CASE = "qwen3, head_dim unlike hidden/heads"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    reference.save(CASE, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards(saved: Path, tmp_path: Path) -> None:
    reference.save(CASE, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(all_logits(load_model(str(tmp_path)), [1, 2]), all_logits(load_model(str(saved)), [1, 2]))


@pytest.mark.parametrize(("chosen", "template"), [("tool_use", "with tools"), ("{{ 5 }}", "{{ 5 }}")])
def test_an_engine_has_the_chat_template_that_was_chosen_by_name_or_text(
    chosen: str, template: str, folder: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save(folder)
    loaded = load_for(EngineConfig(str(folder), device="cpu", chat_template=chosen, chat_template_kwargs={"depth": 3}))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == template
    assert loaded.tokenizer.template_kwargs == {"depth": 3}


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    reference.save(CASE, tmp_path, max_shard_size="40KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    assert first.name in refusal(tmp_path)


def test_end_tokens(folder: Path) -> None:
    assert load_model(str(folder)).config.eos_token_ids == (2, 5)


def test_stored_in_half_precision(folder: Path) -> None:
    before = load_model(str(folder), dtype="bf16")
    edit_weights(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    after = load_model(str(folder), dtype="bf16")
    assert torch.equal(all_logits(before, [1, 2, 3]), all_logits(after, [1, 2, 3]))


def test_without_tokenizer_files_there_is_no_tokenizer(folder: Path) -> None:
    assert load_tokenizer(str(folder)) is None


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    assert "lacks tensors model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_an_unexpected_tensor_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}))
    assert "unexpected tensors model.layers.0.self_attn.o_proj.bias" in refusal(folder)


def test_a_wrong_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    assert "model.norm.weight has shape [47], but the configuration says [48]" in refusal(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    assert "int8" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert WEIGHTS in refusal(folder)


@pytest.mark.parametrize(
    "index", [{"metadata": {}}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}], ids=str
)
def test_a_broken_index_is_refused(folder: Path, index: dict[str, object]) -> None:
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    assert "has no weight_map" in refusal(folder)


def test_an_index_cannot_name_files_outside_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    names = list(load_file(outside))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../outside.safetensors")}))
    assert "../outside.safetensors" in refusal(folder)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "pickled" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no weights" in refusal(folder)


def test_tied_model_may_store_its_head_too(tmp_path: Path) -> None:
    theirs = reference.save("qwen2, tied", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS)
    reference.assert_close(all_logits(load_model(str(tmp_path)), [3, 4]), reference.logits(theirs, [3, 4]))
