"""Hugging Face folders: what config.json, JSON files and safetensors may say, and what they only claim."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import reference
from tests.variants import variant
from tests.variants.plain import IDS

LLAMA, QWEN2, QWEN3 = "llama, 3 queries a KV head", "qwen2", "qwen3, head_dim unlike hidden/heads"
TIED = "qwen2, tied"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LIMIT = ("--max-model-len", "64")
Edit = Callable[[Path], object]


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    """A change to ... removes the key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def add_variant(
    name: str,
    edit: Edit | dict[str, Any],
    refused: str | None = None,
    case: str = LLAMA,
    options: tuple[str, ...] = IDS,
) -> None:
    def make(folder: Path) -> Path:
        reference.save(case, folder)
        if isinstance(edit, dict):
            edit_config(folder, edit)
        else:
            edit(folder)
        return folder

    variant(f"config: {name}", refused, (*options, *IDS))(make)


# -- what config.json may say ------------------------------------------------------------------------------------------

for _key in ("head_dim", "rope_scaling", "sliding_window", "layer_types", "architectures", "eos_token_id",
             "bos_token_id", "torch_dtype", "quantization_config", "pad_token_id", "pretraining_tp"):  # fmt: skip
    add_variant(f"{_key} null", {_key: None})
for _key in ("tie_word_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "vocab_size", "rope_theta"):
    add_variant(f"{_key} null, which transformers refuses", {_key: None, "rope_parameters": None}, _key)
add_variant("rope_theta null, but not in rope_parameters", {"rope_theta": None})
add_variant("quantization_config {}", {"quantization_config": {}})
add_variant("architectures []", {"architectures": []})
add_variant("layer_types []", {"layer_types": []}, "layer_types")
add_variant("tie_word_embeddings 'false'", {"tie_word_embeddings": "false"}, "tie_word_embeddings")
add_variant("is_causal false", {"is_causal": False}, "is_causal False is not supported")
add_variant("another model_type", {"model_type": "mistral"}, "model_type 'mistral'")
add_variant("Qwen3 without head_dim, which is then 128", {"head_dim": ...}, "shape", case=QWEN3)
add_variant("Qwen2 without KV heads, which are then 32", {"num_key_value_heads": ...}, "32 KV heads", case=QWEN2)
_WINDOW = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": ...}
add_variant("Qwen2 with a window", _WINDOW, "sliding_window", case=QWEN2)
add_variant("Qwen2 with a window from a layer that it lacks", _WINDOW | {"max_window_layers": 3}, case=QWEN2)
add_variant("linear rope", {"rope_scaling": {"type": "linear", "factor": 4.0}})
add_variant(
    "yarn", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, case=QWEN3
)
add_variant("dynamic rope", {"rope_scaling": {"type": "dynamic", "factor": 4.0}})
add_variant("longrope", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope' is not supported")
add_variant("a rope factor without a type", {"rope_scaling": {"factor": 4.0}}, "factor 4.0 is not supported")
add_variant("an unknown rope key", {"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 2}}, "alpha 2")
add_variant("an id beyond the vocabulary", {"eos_token_id": [2, 97, 10**12, -1]})
add_variant("true as an end token", {"eos_token_id": True}, "eos_token_id")
add_variant("100,000 end tokens", {"eos_token_id": list(range(100_000, 0, -1))})

# -- what it only claims -----------------------------------------------------------------------------------------------

for _key in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
    for _value in (10**9, 10**12, 10**4000):
        add_variant(f"{_key} 1e{len(str(_value)) - 1}", {_key: _value}, _key.replace("key_value", "kv|key_value"))
for _key, _value in (("num_hidden_layers", 4000), ("vocab_size", 10**8), ("hidden_size", 6 * 10**7)):
    add_variant(f"{_key} {_value:,}", {_key: _value}, "layers|shape")
add_variant(
    "1e12 positions with a limit",
    {"max_position_embeddings": 10**12},
    "position",
    options=("--max-model-len", "64", *IDS),
)
add_variant("1e8 positions", {"max_position_embeddings": 10**8}, "pass max_model_len")
add_variant("1e8 positions with a limit", {"max_position_embeddings": 10**8}, options=LIMIT)


def nested(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")

    return edit


def sparse(name: str, size: int = 2**40) -> Edit:
    def edit(folder: Path) -> None:
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
            file.truncate(size)

    return edit


for _name in ("config.json", "generation_config.json", "quantize_config.json"):
    add_variant(f"{_name} nested deeply", nested(_name), _name)
    add_variant(f"{_name} of a terabyte", sparse(_name), _name)


def index(values: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps(values))

    return edit


add_variant(
    "an index of a million shards", index({"weight_map": {f"t{i}": f"s{i}" for i in range(10**6)}}), "index.json"
)
add_variant(
    "an index of 90,000 shards", index({"weight_map": {f"t{i}": f"s{i}" for i in range(90_000)}}), "lacks 90000"
)
add_variant("an index of numbers", index({"weight_map": {"a": 1, "b": None}}), "lacks|index")


def both(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


add_variant("an index next to model.safetensors, which transformers takes", both)


def header(entries: dict[str, Any] | bytes, length: int | None = None, data: int = 0) -> Edit:
    def edit(folder: Path) -> None:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", len(text) if length is None else length) + text)
            file.truncate(8 + len(text) + data)

    return edit


def entry(shape: list[int], size: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


_EMBEDDING = "model.embed_tokens.weight"
add_variant("a header of 2**60 bytes", header({}, 2**60), WEIGHTS)
add_variant("a header of 2**64-1 bytes", header({}, 2**64 - 1), WEIGHTS)
add_variant("no tensors", header({}), "tensors")
add_variant("a shape of 2**62", header({_EMBEDDING: entry([2**62, 2**62], 4)}, data=4), WEIGHTS)
add_variant("a shape of 2**32", header({_EMBEDDING: entry([2**32, 2**32], 4)}, data=4), WEIGHTS)
add_variant("offsets beyond the file", header({_EMBEDDING: entry([97, 48], 97 * 48 * 4)}, data=4), WEIGHTS)
add_variant("a header nested deeply", header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), WEIGHTS)
add_variant("70,000 empty tensors", header({f"t{i}": entry([0], 0) for i in range(70_000)}), "num_layers|header")
add_variant("a terabyte of nothing", sparse(WEIGHTS), f"{WEIGHTS}|allocate")


def terabyte(folder: Path) -> None:
    """All that the configuration claims is there, in a file that takes no room."""
    from common.models import ModelConfig
    from common.models.weights import tensor_shapes

    edit_config(folder, {"vocab_size": 10**8, "hidden_size": 3072, "num_attention_heads": 6, "head_dim": 512})
    values = json.loads((folder / "config.json").read_text())
    entries, at = {}, 0
    for name, shape in tensor_shapes(ModelConfig.from_hf("m", values)).items():
        size = 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header(entries, data=at)(folder)


add_variant("weights of a terabyte that are there", terabyte, "bytes, and .* are free|more memory than there is")

# -- tensors -----------------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file({name: value.contiguous() for name, value in values.items()}, folder / WEIGHTS)

    return edit


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return tensors(lambda found: found.update({"lm_head.weight": change(found[_EMBEDDING].clone())}))


add_variant("a tied head that is stored", with_head(lambda weight: weight), case=TIED)
add_variant("a tied head that differs", with_head(lambda weight: weight.flip(0)), case=TIED)
add_variant("a tied head of another shape", with_head(lambda weight: weight[1:]), "lm_head.weight has shape", case=TIED)
add_variant("no head, not tied", tensors(lambda found: found.pop("lm_head.weight")), "lacks tensors lm_head.weight")
add_variant("a classifier's head too", tensors(lambda found: found.update({"score.weight": torch.zeros(2, 48)})))
add_variant(
    "a bias that the configuration does not have",
    tensors(lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
    "unexpected tensors",
)
add_variant("fewer layers than the file has", {"num_hidden_layers": 2}, "unexpected tensors")
