"""Small tokenizers of GGUF files, and texts that are hard to cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from tests.models import gguf_writer

PRES = [
    *("gpt-2", "a.x-4.0", "trillion", "smollm", "refact", "minerva-7b", "llama-bpe", "falcon3", "smaug-bpe", "qwen2"),
    *("deepseek-r1-qwen", "megrez", "qwen35", "seed-coder", "deepseek-llm", "deepseek-coder", "default"),
]

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\t \r\n",
    "hello",
    " hello",
    "  hello",
    "hello hello",
    "hello  hello   hello ",
    "hello\nhello\n\n hello",
    "12 123 1234567 3.14 2024-11-30",
    "don't I'LL we've it's 's 'S",
    "def f(x):\n    return x[1:] + \"hello\"  # {a: 'b'}",
    "!!! ... ?! -- == <= => ~/$HOME `x` ^_^ |a|",
    "café naïve Straße ÉCOLE",
    "cafe\u0301 e\u0301",
    "жизнь αβγ 日本語 한국어 עברית العربية हिन्दी ไทย",
    "🚀 👩\u200d👩\u200d👧 🇩🇪 😶\u200d🌫️",
    "a\u00a0b\u3000c\u200bd",
    "½ ٣ ² Ⅷ",
    "<|start|>hello<|end|>",
    "<tool>hello</tool> <|end|> hello",
    "<s>hello</s><unk>",
    "<0x0A> ▁hello ▁ ▁▁",
    "HelloWorld camelCase snake_case SHOUTING",
    "\x00\x7f",
    "hellohello12hello",
]


def byte_level_metadata(pre: str | None, **more: Any) -> dict[str, Any]:
    """A tokenizer of all bytes, a few merges and four special tokens. pre: None leaves the key out."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [
        "h e",
        "l l",
        "1 2",
        "12 3",
        "Ġ he",
        "ll o",
        "he llo",
        "Ġhe llo",
        "Ġ Ġ",
        "Ċ Ċ",
        "' s",
        "- -",
        "Ġ (",
        ". .",
    ]
    merges += ["Ġ 1", "Ã ©", "e Ì", "' S", ") :"]
    made = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), *made, "<|start|>", "<tool>"]
    types = [3] + [1] * (len(tokens) - 3) + [3, 4]
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": 0,
        "bos_token_id": len(tokens) - 2,
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """As Llama 2's: <unk>, <s>, </s>, 256 bytes, merged pieces with falling scores, letters; and two added tokens."""
    letters = "▁helowrdanticsHLCSfx12é日本ж'!.-=()[]{}:\"#"
    pieces = [
        "▁▁",
        "he",
        "ll",
        "▁he",
        "llo",
        "hello",
        "▁hello",
        "lo",
        "el",
        "▁▁▁▁",
        "12",
        "ca",
        "on",
        "an",
        "hell",
        "at",
        "--",
    ]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, *letters, "<|im_end|>", "<tool>"]
    types = [2, 3, 3, *([6] * 256), *([1] * (len(pieces) + len(letters))), 3, 4]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces) + len(letters))] + [-1000.0, -1000.0]
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


CASES: dict[str, dict[str, Any]] = {
    **{f"byte-level, pre {pre}": byte_level_metadata(pre) for pre in PRES},
    "byte-level, no pre": byte_level_metadata(None),
    "byte-level, BOS and EOS": byte_level_metadata("qwen2", add_bos_token=True, add_eos_token=True),
    "byte-level, llama-bpe without BOS": byte_level_metadata("llama-bpe", add_bos_token=False),
    "byte-level, no token types": byte_level_metadata("qwen2", token_type=None),
    "SentencePiece": sentencepiece_metadata(),
    "SentencePiece, no pre, no ids": sentencepiece_metadata(pre=None, bos_token_id=None, eos_token_id=None),
    "SentencePiece, no prefix": sentencepiece_metadata(add_space_prefix=False),
    "SentencePiece, EOS but no BOS": sentencepiece_metadata(add_bos_token=False, add_eos_token=True),
}


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file with no tensors: llama.cpp tokenises with it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        gguf_writer.add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
