"""Files that are large, many, deep or extreme where no model's are: one line, within 2 s and 64 MiB."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import EngineConfig, UserError
from common.errors import refusing
from common.models import load_for, load_tokenizer
from common.models.sources import gguf_file as _  # noqa: F401  # imported before memory is measured
from common.text.json_file import read_json
from common.watch.progress import say
from tests.models import fuzz_folder, fuzz_gguf, gguf_writer, reference
from tests.models.forked import check_refused, load, outcome
from tests.models.fuzz_gguf import ARRAY, STRING
from tests.models.tokenizer_cases import sentencepiece_metadata

LLAMA = "llama, 3 queries a KV head"
SPARSE = 3 << 30
Edit = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    reference.make(LLAMA, **fuzz_folder.SMALL).save_pretrained(path)
    fuzz_folder.write_tokenizer(path)
    return path


def config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def refused(model: Path) -> str:
    return check_refused(lambda: load(model))


# -- folders -----------------------------------------------------------------------------------------------------------

FILES = (
    *("config.json", "generation_config.json", "quantize_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "vocab.txt", "tekken.json", "tiktoken.model", "chat_template.jinja"),
    *("chat_template.json", "spiece.model", "processor_config.json", "tokenizer.model.v3.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_3_gib_is_not_read(name: str, folder: Path) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(SPARSE)
    assert name in refused(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [*(n for n in FILES if n != "chat_template.jinja"), "model.safetensors", "a shard"])
def test_a_pipe_or_a_folder_is_no_file(name: str, make: Callable[[Path], None], folder: Path) -> None:
    if "safetensors" in name or name == "a shard":
        (folder / "model.safetensors").unlink()
    if name == "a shard":
        name = "part.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert f"{name} is no file, but a folder, a pipe" in refused(folder)


LONG = {
    "lists": '{"a":[' + "[]," * 1_300_000 + "[]]}",
    "objects": '{"a":[' + '{"a":1},' * 500_000 + "{}]}",
    "keys": "{" + ",".join(f'"{i:x}":"{i + 256:x}"' for i in range(250_000)) + "}",
    "texts": '{"a":[' + ",".join(f'"{i:x}"' for i in range(450_000)) + "]}",
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"])
@pytest.mark.parametrize("kind", LONG)
def test_json_of_many_values_is_not_parsed(kind: str, name: str, folder: Path) -> None:
    if name == "vocab.json":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(LONG[kind])
    if name != "vocab.json" or kind in ("lists", "objects"):
        assert name in refused(folder)


def test_json_within_the_limits_takes_little_memory(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.json", [f'"{i:x}":"{i + 256:x}"' for i in range(199_000)]
    for text in (
        "{" + ",".join(texts) + "}",
        '{"a":"😀' + "a" * (4_000_000) + '"}',
        '{"a":[' + "[]," * 199_000 + "0]}",
    ):
        path.write_text(text)
        came, seconds, memory = outcome(lambda: read_json(path, largest=16 << 20))
        assert came == "loads" and seconds < 2 and memory < 64 << 20, (came, seconds, memory >> 20)
    path.write_text('{"a":"\\ud83d\\ude00' + "a" * 12_000_000 + '"}')
    assert "too many bytes" in check_refused(lambda: read_json(path, largest=16 << 20))


def test_a_list_of_65000_added_tokens_is_read(tmp_path: Path) -> None:
    """As models of speech have it: 12 MB."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    tokens = {str(i): {"content": f"<|s_{i}|>", **flags, "special": True} for i in range(65_536)}
    (tmp_path / "a.json").write_text(json.dumps({"added_tokens_decoder": tokens}, indent=4))
    assert len(read_json(tmp_path / "a.json", largest=16 << 20)["added_tokens_decoder"]) == 65_536


def _id(folder: Path, place: str) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    if place in ("vocab", "both"):
        values["model"]["vocab"]["zz"] = 4_000_000_000
    if place in ("added_tokens", "both"):
        values["added_tokens"].append({**values["added_tokens"][0], "id": 4_000_000_000, "content": "zz"})
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize("made_for", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("place", ["vocab", "both"])
def test_an_id_far_beyond_the_vocabulary_is_refused(place: str, made_for: str, folder: Path) -> None:
    _id(folder, place)
    options = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": made_for}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    assert "'zz' has the id 4000000000" in refused(folder)


# -- numbers -----------------------------------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXTREME = (10**400, 1e-320, 1e308, 5e-324)
PLACES: list[tuple[str, dict[str, Any]]] = [("rms_norm_eps", {}), ("rope_theta", {})]
PLACES += [(key, YARN) for key in ("factor", "beta_fast", "beta_slow", "attention_factor", "rope_theta")]
PLACES += [(key, LLAMA3) for key in ("factor", "low_freq_factor", "high_freq_factor")]


@pytest.mark.parametrize("value", EXTREME)
@pytest.mark.parametrize(("key", "scaling"), PLACES)
def test_a_number_that_float32_does_not_have_is_refused(
    key: str, scaling: dict[str, Any], value: float, folder: Path
) -> None:
    changes = {"rope_scaling": {**scaling, key: value}} if scaling else {key: value, "rope_parameters": None}
    config(folder, **changes)
    with pytest.raises(UserError, match=key):
        load_for(EngineConfig(model=str(folder), device="cpu"))


def test_frequencies_that_give_no_angle_are_refused(folder: Path) -> None:
    config(folder, max_position_embeddings=131_072, rope_scaling={"type": "linear", "factor": 1e-37})
    with pytest.raises(UserError, match="no finite angle"):
        load_for(EngineConfig(model=str(folder), device="cpu"))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def _big_text(length: int) -> bytes:
    return struct.pack("<Q", length)


@pytest.mark.parametrize(
    "place",
    ["a key", "general.name", "tokenizer.chat_template", "tokenizer.chat_template.x", "in an array", "a tensor"],
)
@pytest.mark.parametrize("length", [1 << 30, 60 << 20])
def test_a_gguf_text_of_a_gigabyte_is_not_read(place: str, length: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0 if place != "a tensor" else 1, 0 if place == "a tensor" else 1)
    if place not in ("a key", "a tensor"):
        key = "tokenizer.ggml.tokens" if place == "in an array" else place
        kind = struct.pack("<IIQ", ARRAY, STRING, 1) if place == "in an array" else struct.pack("<I", STRING)
        head += fuzz_gguf.encode_text(key) + kind
    with path.open("wb") as file:
        file.write(head + _big_text(length))
        file.truncate(len(head) + 8 + length + 64)
    assert "than any model" in refused(path)


@pytest.mark.parametrize("kind", ["keys", "tensors", "dimensions", "texts", "numbers"])
def test_gguf_counts_that_no_model_has_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys, tensors = {"keys": (10**6, 0), "tensors": (0, 300_000), "dimensions": (0, 1)}.get(kind, (1, 0))
    parts = [b"GGUF", struct.pack("<IQQ", 3, tensors, keys)]
    if kind == "keys":
        parts += [fuzz_gguf.encode_text(f"k{i}") + struct.pack("<IB", 0, 1) for i in range(keys)]
    elif kind == "tensors":
        parts += [fuzz_gguf.encode_text(f"t{i}") + struct.pack("<IQIQ", 1, 1, 0, 0) for i in range(tensors)]
    elif kind == "dimensions":
        parts += [fuzz_gguf.encode_text("t") + struct.pack("<I", 10**8)]
    elif kind == "texts":
        texts = b"".join(fuzz_gguf.encode_text(f"{i:x}") for i in range(1_500_000))
        parts += [fuzz_gguf.encode_text("a") + struct.pack("<IIQ", ARRAY, STRING, 1_500_000) + texts]
    else:
        parts += [fuzz_gguf.encode_text("tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, 6, 10**8)]
    data = b"".join(parts)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + (1 << 30) * (kind in ("dimensions", "numbers")))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("longest", [600, 1300])
def test_tokens_that_give_endless_pairs_are_refused(longest: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = sentencepiece_metadata()
    more = ["q" * n for n in range(3, longest)]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *more]
    for key, value in (("scores", -1.0), ("token_type", 1)):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], *[value] * len(more)]
    sizes = {**fuzz_gguf.SMALL, **fuzz_gguf.HEADS, "head_dim": 8}
    theirs = reference.make(LLAMA, vocab_size=len(metadata["tokenizer.ggml.tokens"]), **sizes)
    gguf_writer.write(theirs, path, extra=metadata)
    assert "absurdly long" in refused(path)


def test_a_gguf_key_that_changes_nothing_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    same = {"llama.use_parallel_residual": False, "llama.attention.layer_norm_epsilon": 1e-2}
    gguf_writer.write(reference.make(LLAMA), path, extra=same)
    load(path)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_every_message_is_one_printable_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(UserError("a\nb\x1b[31m\u2028\ud800é")) == "a\\nb\\x1b[31m\\u2028\\ud800é"
    say("a\r\x1b[2Jb")
    assert capsys.readouterr().err == "a\\r\\x1b[2Jb\n"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x\\ny"}}')
    with pytest.raises(UserError) as caught:
        load_for(EngineConfig(model=str(folder), device="cpu"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("error", "said"), [(MemoryError(), "needs more memory"), (KeyError("a\nb"), "damaged")])
def test_whatever_a_file_makes_fail_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(UserError, match=said), refusing("m"):
        raise error


# -- as people have them -----------------------------------------------------------------------------------------------


def test_what_transformers_takes_loads(folder: Path) -> None:
    config(folder, architectures="LlamaForCausalLM")
    values = json.loads((folder / "config.json").read_text())
    del values["max_position_embeddings"]
    for name, text in (("config.json", json.dumps(values)), ("tokenizer_config.json", None)):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (text or (folder / name).read_text()).encode())
    loaded = load_for(EngineConfig(model=str(folder), device="cpu"))
    assert loaded.max_model_len == 2048
    assert load_tokenizer(str(folder)) is not None


def test_more_positions_than_usual_are_for_those_who_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for claimed, length in ((131_072, 131_072), (10_000_000, 131_072)):
        config(folder, max_position_embeddings=claimed)
        assert load_for(EngineConfig(model=str(folder), device="cpu")).max_model_len == length
    assert "has 10,000,000 positions, and requests may have 131,072: pass max_model_len" in capsys.readouterr().err
    assert load_for(EngineConfig(model=str(folder), device="cpu", max_model_len=200_000)).max_model_len == 200_000
