"""Mutated Hugging Face folders for tests/models/fuzz.py: values of JSON files, headers and bytes of weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.models import reference
from tests.models.fuzz import mutate_bytes, nasty

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 8,
}
CASES: dict[str, dict[str, Any]] = {
    "llama, stretched rope": {},
    "qwen2, tied": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    "qwen3, head_dim unlike hidden/heads": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": None}
KEYS = ("rope_scaling", "layer_types", "quantization_config", "tie_word_embeddings", "sliding_window", "is_causal",
        "use_sliding_window", "original_max_position_embeddings", "per_layer_config", "partial_rotary_factor",
        "architectures", "model_type", "bos_token_id", "weight_map", "chat_template", "truncate", "mscale")  # fmt: skip


class Folders:
    def valid(self, folder: Path) -> list[Path]:
        paths = [folder / str(number) for number in range(len(CASES))]
        for path, (case, changes) in zip(paths, CASES.items(), strict=True):
            parts = {"max_shard_size": "4KB"} if path == paths[0] else {}
            reference.make(case, **SMALL, **changes).save_pretrained(path, **parts)
            write_tokenizer(path)
        tied = paths[1] / "model.safetensors"
        tensors = load_file(tied)
        head = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors | {"lm_head.weight": head, "v_head.weight": torch.ones(2)}, tied)
        return paths

    def mutate(self, chance: random.Random, model: Path, folder: Path) -> Path:
        copy = Path(shutil.copytree(model, folder / "model"))
        names = sorted(path.name for path in copy.iterdir())
        names += [name for name in names if "config" in name] * 3
        for name in sorted(set(chance.sample(names, chance.choice((1, 1, 1, 2))))):
            path = copy / name
            data = path.read_bytes()
            if chance.random() < 0.05:
                path.write_bytes(huge(chance, data))
                if chance.random() < 0.3:
                    os.truncate(path, 3 << 30)
            elif name.endswith(".safetensors"):
                path.write_bytes(mutate_weights(chance, data))
            elif chance.random() < 0.2:
                path.write_bytes(mutate_bytes(chance, data))
            else:
                path.write_text(json.dumps(mutate_json(chance, json.loads(data))))
        return copy


def write_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*letters, "he"])}, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([text for text in SPECIAL.values() if text])
    backend.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def huge(chance: random.Random, data: bytes) -> bytes:
    """Valid JSON in front, and very much of something in it."""
    count = chance.choice((10**4, 10**5, 10**6))
    many = chance.choice((b"[],", b"{},", b'"ab",', b'{"a":1},', b"1.5,", b"[1,[2]],"))
    inside = chance.choice((b"[" + many * count + b"0]", b'"' + b"a" * 8 * count + b'"', b"9" * count))
    return data.rstrip()[:-1] + b', "zz": ' + inside + b"}"


def mutate_json(chance: random.Random, value: Any) -> Any:
    """One or two places of a JSON value changed."""
    for _ in range(chance.choice((1, 1, 2))):
        holders = [value, *(part for part in _parts(value) if isinstance(part, dict | list) and part)]
        holder = chance.choice(holders)
        if not isinstance(holder, dict | list) or not holder:
            return nasty_json(chance)
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, change = chance.choice(keys), chance.randrange(8)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[chance.choice((*KEYS, f"{key}x"))] = chance.choice((nasty_json(chance), holder[key]))
        elif change == 2:
            holder[key] = chance.choice((holder[chance.choice(keys)], [holder[key]], {"a": holder[key]}))
        else:
            holder[key] = nasty_json(chance)
    return value


def _parts(value: Any) -> list[Any]:
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [*children, *(part for child in children for part in _parts(child))]


def nasty_json(chance: random.Random) -> Any:
    return chance.choice(
        (nasty(chance), nasty(chance), 10**400, None, {}, [], {"rope_type": "yarn"}, {"type": nasty(chance)})
    )


def mutate_weights(chance: random.Random, data: bytes) -> bytes:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if chance.random() < 0.4:
        return mutate_bytes(chance, data, end)
    header = json.dumps(mutate_json(chance, json.loads(data[8:end]))).encode()
    length = chance.choice((len(header),) * 8 + (2**60, 0, len(header) + 1))
    return struct.pack("<Q", length) + header + data[end:]
