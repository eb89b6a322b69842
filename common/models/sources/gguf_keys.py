"""What a GGUF file's metadata says about the model, below the name of its architecture; and its token ids.
llama.cpp is the reference for what a key means, and for what it means that one is missing; but YaRN's attention factor
and betas, which it overwrites in some architectures, are applied, as they are in the model that was converted."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import require, require_number
from common.models.rope import LinearScaling, RopeScaling, YarnScaling, checked, yarn_attention_factor
from common.models.sources.gguf_reader import Metadata

_KEYS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


class ModelKeys:
    """Every key below `{architecture}.` is read, or has a value that switches it off, or is refused by name."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self._metadata = metadata
        self._prefix = f"{architecture}."
        for whole, value in metadata.values.items():
            key = whole.removeprefix(self._prefix)
            number = value if isinstance(value, int | float) else None
            off = (number == 0 and key in _KEYS["off_at_zero"]) or (number == 1 and key in _KEYS["off_at_one"])
            known = off or key == whole or key in _KEYS["read"] or key in _KEYS["change_nothing"]
            require(known, f"{metadata.name}: {whole[:80]} {metadata.show(whole)} is not supported")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. One for each layer: only where they are all the same."""
        name, values = f"{self._metadata.name}: {self._prefix}{key}", self._metadata.values.get(self._prefix + key)
        if isinstance(values, np.ndarray) and len(values):
            require(bool((values == values[0]).all()), f"{name} differs between layers, which is not supported")
            value: Any = values[0].item()
        else:
            value = default if values is None and default is not None else self._metadata.need(self._prefix + key, int)
        require_number(name, value, int, 1)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        key = self._prefix + key
        value = self._metadata.need(key, float, default)
        require_number(f"{self._metadata.name}: {key}", value, float, -1e30, 1e30)
        return value

    def rope_scaling(self) -> RopeScaling | None:
        """A factor without a type is linear; a factor of 0 is none."""
        at, name = "rope.scaling.", f"{self._metadata.name}: {self._prefix}rope.scaling."
        theta = self.number("rope.freq_base", 10000.0)
        kind = self._metadata.get(f"{self._prefix}{at}type", str) or "linear"
        require(kind in ("none", "linear", "yarn"), f"{name}type {kind[:80]!r} is not supported")
        factor = self.number(f"{at}factor", self.number("rope.scale_linear", 0.0)) or 1.0
        extrapolation, yarn = self.number(f"{at}yarn_ext_factor", -1.0), kind == "yarn"
        require(extrapolation in (-1.0, float(yarn)), f"{name}yarn_ext_factor {extrapolation} is not supported")
        if kind == "none" or factor == 1.0:
            return None
        if not yarn:
            return checked(name, LinearScaling(factor), theta)
        attention = self.number(f"{at}yarn_attn_factor", yarn_attention_factor(factor))
        betas = self.number(f"{at}yarn_beta_fast", 32.0), self.number(f"{at}yarn_beta_slow", 1.0)
        context = self.size(f"{at}original_context_length", self.size("context_length"))
        return checked(name, YarnScaling(factor, context, attention, *betas), theta)


def token_id(metadata: Metadata, name: str, vocab_size: int, default: int | None = None) -> int | None:
    """`tokenizer.ggml.{name}_token_id`; None where the file names none, also as -1."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key, int)
    if value in (None, -1, (1 << 32) - 1):
        return default if value is None and default is not None and default < vocab_size else None
    metadata.require(0 <= value < vocab_size, f"{key} is {value}, but the vocabulary has {vocab_size} tokens")
    return value


def end_tokens(metadata: Metadata, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer. Without a key, a SentencePiece vocabulary has </s> at 2."""
    default = 2 if metadata.values.get("tokenizer.ggml.model") == "llama" else None
    ids = [token_id(metadata, k, vocab_size, default if k == "eos" else None) for k in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))
