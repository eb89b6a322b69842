"""Mutated GGUF files for tests/models/fuzz.py. Encoded here, because the library refuses to write what is wrong."""

from __future__ import annotations

import math
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.models.sources.gguf_reader import read_header
from tests.models import gguf_writer, reference
from tests.models.fuzz import FLOATS, INTEGERS, TEXTS, mutate_bytes, nasty
from tests.models.tokenizer_cases import byte_level_metadata, sentencepiece_metadata

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "max_position_embeddings": 32,
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass
class Value:
    """A value in the file's own types. claims: how many elements an array says that it has; None: what it has."""

    kind: int
    value: Any
    inner: int = 0
    claims: int | None = None


def encode_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_number(kind: int, value: Any) -> bytes:
    """What does not fit is taken modulo the type's size."""
    code = FORMATS[kind]
    if code in "fd":
        value = float(value)
        value = math.copysign(math.inf, value) if code == "f" and abs(value) > 3e38 else value
    elif code != "?":
        bits = 8 * struct.calcsize(code)
        value = int(value) % (1 << bits)
        value -= (1 << bits) if code.islower() and value >= 1 << (bits - 1) else 0
    return struct.pack("<" + code, value)


def encode_value(value: Value) -> bytes:
    if value.kind == STRING:
        return encode_text(str(value.value))
    if value.kind != ARRAY:
        return encode_number(value.kind, value.value) if value.kind in FORMATS else bytes(8)
    elements = value.value if isinstance(value.value, list) else []
    count = len(elements) if value.claims is None else value.claims
    parts = [
        encode_value(element if isinstance(element, Value) else Value(value.inner, element)) for element in elements
    ]
    return struct.pack("<IQ", value.inner, count) + b"".join(parts)


def encode(
    values: list[tuple[str, Value]], tensors: list[tuple[str, list[int], int, int]], data: bytes
) -> tuple[bytes, int]:
    """The file, and where its header ends."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values:
        parts += [encode_text(key), struct.pack("<I", value.kind), encode_value(value)]
    for name, dimensions, kind, offset in tensors:
        sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        parts += [encode_text(name), sizes, struct.pack("<IQ", kind, offset)]
    header = b"".join(parts)
    return header + bytes(-len(header) % 32) + data, len(header)


def typed(value: Any) -> Value:
    if isinstance(value, list):
        inner = STRING if value and isinstance(value[0], str) else 6 if value and isinstance(value[0], float) else 5
        return Value(ARRAY, value, inner)
    return Value({bool: 7, int: 4, float: 6, str: STRING}[type(value)], value)


def decode(path: Path) -> tuple[list[tuple[str, Value]], list[tuple[str, list[int], int, int]], bytes]:
    """What `encode` takes."""
    metadata, found = read_header(path)
    values = [
        (key, typed(value if isinstance(value, list) or not hasattr(value, "tolist") else value.tolist()))
        for key, value in metadata.items()
    ]
    tensors: list[tuple[str, list[int], int, int]] = []
    data = b""
    for name, tensor in found.items():
        tensors.append((name, list(reversed(tensor.shape)), int(tensor.kind), len(data)))
        data += tensor.data.tobytes()
        data += bytes(-len(data) % 32)
    return values, tensors, data


class GGUFFiles:
    def valid(self, folder: Path) -> list[Path]:
        llama3 = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        files = {
            "llama, 3 queries a KV head": sentencepiece_metadata() | llama3,
            "qwen2": byte_level_metadata("qwen2", add_bos_token=True),
            "qwen3, tied, 8 queries a KV head": byte_level_metadata("llama-bpe"),
        }
        paths: list[Path] = []
        for number, (case, metadata) in enumerate(files.items()):
            size = len(metadata["tokenizer.ggml.tokens"])
            paths.append(folder / f"{number}.gguf")
            model = reference.make(case, vocab_size=size, head_dim=8, **SMALL, **HEADS)
            gguf_writer.write(model, paths[-1], extra=metadata)
        return paths

    def mutate(self, chance: random.Random, model: Path, folder: Path) -> Path:
        path = folder / "model.gguf"
        values, tensors, data = decode(model)
        how = chance.randrange(14)
        if how >= 10:
            how = 0
            _mutate_mildly(chance, values)
            if chance.random() < 0.8:
                path.write_bytes(encode(values, tensors, data)[0])
                return path
        for _ in range(chance.choice((1, 1, 2, 3))):
            if how < 6 and values:
                _mutate_values(chance, values)
            elif how < 8 and tensors:
                _mutate_tensors(chance, tensors)
        encoded, end = encode(values, tensors, data)
        for _ in range(chance.choice((1, 1, 2, 5)) if how >= 8 else 0):
            encoded = mutate_bytes(chance, encoded or b"x", min(end, len(encoded)) or 1)
        path.write_bytes(encoded)
        if chance.random() < 0.05:
            os.truncate(path, 3 << 30)
        return path


FREE = ("general.name", "general.author", "general.tags", "x.y", "tokenizer.chat_template.tool_use")
NUMBERS = ("rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor", "rope.scale_linear",
           "context_length")  # fmt: skip


def _mutate_mildly(chance: random.Random, values: list[tuple[str, Value]]) -> None:
    """What a file may well have, or what is only very large."""
    architecture = next(value.value for key, value in values if key == "general.architecture")
    for _ in range(chance.choice((1, 1, 2, 3))):
        change = chance.randrange(6)
        key = chance.choice(FREE)
        if change == 0:
            new = Value(
                STRING, chance.choice(("x", "é\n", "😀", "{{ messages }}")) * chance.choice((1, 10, 10**5, 10**7))
            )
        elif change == 1:
            new = Value(ARRAY, ["ab"] * chance.choice((0, 3, 10**5)), STRING)
        elif change == 2:
            new = Value(ARRAY, [1] * chance.choice((0, 3, 10**5)), chance.choice((0, 4, 5, 6)))
        elif change == 3:
            key = f"{architecture}.{chance.choice(NUMBERS)}"
            old = dict(values).get(key, Value(6, 1.0))
            new = Value(old.kind, old.value * chance.choice((1, 2, 3, 1000)))
        elif change == 4:
            key = chance.choice(
                ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eom_token_id")
            )
            new = Value(4, chance.randrange(30))
        else:
            key = chance.choice(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"))
            new = Value(7, chance.random() < 0.5)
        values[:] = [(k, value) for k, value in values if k != key] + [(key, new)]


def _mutate_values(chance: random.Random, values: list[tuple[str, Value]]) -> None:
    at = chance.randrange(len(values))
    key, old = values[at]
    change = chance.randrange(8)
    if change == 0:
        del values[at]
    elif change == 1:
        values.append(
            (chance.choice((key, key[:-1], key + "x", "tokenizer.ggml.add_bos_token", "llama.rope.foo")), old)
        )
    elif change == 2:
        values[at] = key, Value(chance.randrange(14), chance.choice(INTEGERS))
    elif change == 3:
        inner = chance.choice((4, 5, 6, 7, 8, 9, 12, 13))
        claims = chance.choice((None, None, 2**60, 2**40, 10**7, 3))
        elements = [chance.choice(TEXTS if inner == STRING else INTEGERS) for _ in range(chance.randrange(4))]
        values[at] = key, Value(ARRAY, [] if inner in (9, 13) else elements, inner, claims)
    elif change < 6 and old.kind == ARRAY and old.value:
        elements = list(old.value)
        for _ in range(chance.choice((1, 1, 3))):
            place = chance.randrange(len(elements))
            new = chance.choice(TEXTS if old.inner == STRING else FLOATS if old.inner == 6 else INTEGERS)
            new = chance.choice((new, elements[chance.randrange(len(elements))]))
            elements[place : place + chance.randrange(2)] = [new] if chance.random() < 0.7 else []
            if not elements:
                break
        values[at] = key, Value(ARRAY, elements, old.inner)
    elif old.kind in FORMATS and chance.random() < 0.5:
        values[at] = key, Value(old.kind, chance.choice(FLOATS if old.kind in (6, 12) else INTEGERS))
    else:
        new = nasty(chance)
        simple = not isinstance(new, list) or (
            bool(new) and all(type(e) in (int, float, str) and type(e) is type(new[0]) for e in new)
        )
        values[at] = key, typed(new) if simple else Value(ARRAY, [], 5)


def _mutate_tensors(chance: random.Random, tensors: list[tuple[str, list[int], int, int]]) -> None:
    at = chance.randrange(len(tensors))
    name, dimensions, kind, offset = tensors[at]
    change = chance.randrange(6)
    if change == 0:
        del tensors[at]
        if not tensors:
            tensors.append((name, dimensions, kind, offset))
    elif change == 1:
        tensors.append(
            (
                chance.choice((name, "rope_freqs.weight", "x", "output.weight", "blk.99.attn_q.weight")),
                dimensions,
                kind,
                offset,
            )
        )
    elif change == 2:
        sizes = [chance.choice([*INTEGERS[:3], 16, 24, 2**40]) % 2**64 for _ in range(chance.randrange(6))]
        tensors[at] = name, chance.choice((sizes, dimensions[::-1])), kind, offset
    elif change == 3:
        tensors[at] = name, dimensions, chance.randrange(45), offset
    elif change == 4:
        tensors[at] = name, dimensions, kind, chance.choice([*INTEGERS, offset + 32, offset + 1]) % 2**64
    else:
        tensors[at] = name + chance.choice(("x", ".weight")), dimensions, kind, offset
