"""GGUF files: tokenizers, rope scaling and end tokens as people have them; and files that claim what they have not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tests.models import fuzz_gguf, gguf_writer, reference
from tests.models.fuzz_gguf import ARRAY, STRING, Value
from tests.models.tokenizer_cases import byte_level_metadata, sentencepiece_metadata
from tests.variants import variant

IDS = ("--token-ids", "1, 7, 30")
LLAMA, QWEN2, QWEN3 = "llama, 3 queries a KV head", "qwen2", "qwen3, head_dim unlike hidden/heads"


def _write(folder: Path, case: str, metadata: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    path = folder / "model.gguf"
    size = len(metadata.get("tokenizer.ggml.tokens", range(97)))
    theirs = reference.make(case, vocab_size=size)
    gguf_writer.write(theirs, path, extra=metadata, drop=("tokenizer.ggml.eot_token_id", *drop))
    return path


def _claiming(folder: Path, key: str, value: Value) -> Path:
    """A valid file, but for one value."""
    path = _write(folder, LLAMA, sentencepiece_metadata())
    values, tensors, data = fuzz_gguf.decode(path)
    changed = [(k, v) for k, v in values if k != key]
    path.write_bytes(fuzz_gguf.encode([*changed, (key, value)], tensors, data)[0])
    return path


GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "SentencePiece": (LLAMA, sentencepiece_metadata()),
    "SentencePiece without a prefix": (LLAMA, sentencepiece_metadata(add_space_prefix=False)),
    "SentencePiece without ids": (LLAMA, sentencepiece_metadata(pre=None, bos_token_id=None, eos_token_id=None)),
    "deepseek-r1-qwen": (QWEN2, byte_level_metadata("deepseek-r1-qwen", add_bos_token=True)),
    "pre default": (QWEN2, byte_level_metadata("default")),
    "no pre": (QWEN3, byte_level_metadata(None)),
    "llama-bpe": (LLAMA, byte_level_metadata("llama-bpe")),
    "linear rope by the older key": (LLAMA, sentencepiece_metadata() | {"llama.rope.scale_linear": 4.0}),
    "a rope factor without a type": (LLAMA, sentencepiece_metadata() | {"llama.rope.scaling.factor": 4.0}),
    "yarn": (
        QWEN2,
        byte_level_metadata("qwen2") | {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0},
    ),
    "a head count for each layer": (LLAMA, sentencepiece_metadata() | {"llama.attention.head_count_kv": [2, 2, 2]}),
}
for _name, (_case, _metadata) in GOOD.items():

    @variant(f"gguf: {_name}")
    def good(folder: Path, case: str = _case, metadata: dict[str, Any] = _metadata) -> Path:
        return _write(folder, case, metadata)


@variant("gguf: a tokenizer of another kind, prompts of token ids", options=IDS)
def ids_only(folder: Path) -> Path:
    return _write(folder, LLAMA, byte_level_metadata("falcon"))


CLAIMS: dict[str, tuple[str, Value, str]] = {
    "an array of 2**60 numbers": ("x", Value(ARRAY, [], 4, 2**60), "truncated or damaged"),
    "an array of 2**60 texts": ("tokenizer.ggml.tokens", Value(ARRAY, [], STRING, 2**60), "truncated or damaged"),
    "an array of arrays": ("x", Value(ARRAY, [], ARRAY, 2**40), "truncated or damaged"),
    "10**9 layers": ("llama.block_count", Value(10, 10**9), "layers"),
    "a width of 10**12": ("llama.embedding_length", Value(10, 10**12), "hidden_size|shape"),
    "heads of 10**12": ("llama.attention.key_length", Value(10, 10**12), "head_dim|shape"),
    "a vocabulary of 10**12": ("llama.vocab_size", Value(10, 10**12), "vocab_size is 1000000000000"),
    "10**12 positions": ("llama.context_length", Value(10, 10**12), "max_position_embeddings|memory|max_model_len"),
    "no heads": ("llama.attention.head_count", Value(4, 0), "attention.head_count must be"),
    "a split count that is text": ("split.count", Value(STRING, "2"), "split.count must be int"),
    "an id beyond the vocabulary": ("tokenizer.ggml.bos_token_id", Value(4, 10**6), "bos_token_id is 1000000"),
    "an alignment of 0": ("general.alignment", Value(4, 0), "power of two"),
    "longrope": ("llama.rope.scaling.type", Value(STRING, "longrope"), "'longrope' is not supported"),
    "an unknown rope key": ("llama.rope.scaling.new", Value(6, 2.0), "llama.rope.scaling.new 2.0 is not supported"),
    "an unknown key": ("llama.logits_are_halved", Value(7, True), "logits_are_halved True is not supported"),
    "a template that is a number": ("tokenizer.chat_template", Value(4, 3), "chat_template"),
    "more token types than tokens": (
        "tokenizer.ggml.token_type",
        Value(ARRAY, [1] * (len(sentencepiece_metadata()["tokenizer.ggml.tokens"]) + 1), 5),
        "token_type",
    ),
}
for _name, (_key, _value, _refused) in CLAIMS.items():

    @variant(f"gguf: {_name}", refused=_refused)
    def claiming(folder: Path, key: str = _key, value: Value = _value) -> Path:
        return _claiming(folder, key, value)


MERGES = {"no pairs": ["h e", "hello"], "of unknown tokens": ["h e", "xx yy"], "without a result": ["h q"]}
for _name, _merges in MERGES.items():

    @variant(f"gguf: merges {_name}", refused="merge '.*' is not of two tokens that make a third")
    def merges(folder: Path, merges: list[str] = _merges) -> Path:
        return _write(folder, QWEN2, byte_level_metadata("qwen2", merges=merges))


@variant("gguf: arrays in one another, 200,000 deep", refused="truncated or damaged")
def deep(folder: Path) -> Path:
    path = folder / "model.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fuzz_gguf.encode_text("x") + struct.pack("<I", ARRAY)
    path.write_bytes(header + struct.pack("<IQ", ARRAY, 1) * 200_000)
    return path


@variant("gguf: a tensor that reaches beyond the file", refused="output_norm.weight.*beyond the end")
def beyond(folder: Path) -> Path:
    path = _write(folder, LLAMA, sentencepiece_metadata())
    values, tensors, data = fuzz_gguf.decode(path)
    changed = [(n, [2**40] if n == "output_norm.weight" else d, k, o) for n, d, k, o in tensors]
    path.write_bytes(fuzz_gguf.encode(values, changed, data)[0])
    return path


@variant("gguf: of a big-endian machine", refused="big-endian")
def big_endian(folder: Path) -> Path:
    path = _write(folder, LLAMA, {})
    data = path.read_bytes()
    path.write_bytes(data[:4] + data[4:8][::-1] + data[8:])
    return path


@variant("gguf: half a file", refused="truncated or damaged")
def half(folder: Path) -> Path:
    path = _write(folder, LLAMA, sentencepiece_metadata())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
