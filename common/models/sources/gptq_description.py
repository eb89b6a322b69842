"""What a GPTQ folder says of its layers, in the words of AutoGPTQ, GPTQModel and transformers' GPTQConfig."""

import functools
import math
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from common.errors import UserError, one_line, require
from common.models.quantized_weight import BITS, PER_CHANNEL, WORD, Format
from common.models.weights import Shape

OTHER_WORDS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size", "method": "quant_method"}
FORMAT_WORDS = ("checkpoint_format", "format", "version")
OF_A_LAYER = ("bits", "group_size", "sym", "desc_act", "pack_dtype")
OF_ALL = (*OF_A_LAYER, "quant_method", "checkpoint_format", "lm_head", "dynamic", "model_file_base_name")
HARMLESS: list[str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["harmless"]

SECONDS = 0.8  # For all patterns on all layers: some patterns take years
MOST = 1000  # Characters of a pattern, and repetitions that it counts, which take memory


@dataclass(frozen=True)
class Stored:
    """How a quantised layer is stored. group_size is -1 for one group per output channel."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    form: Format

    @classmethod
    def from_dict(cls, label: str, options: Mapping[str, Any]) -> Self:
        """From `settings`; `UserError` for what is not supported."""
        bits, group = options.get("bits"), options.get("group_size", PER_CHANNEL)
        form, packed = str(options.get("checkpoint_format", "gptq")).lower(), str(options.get("pack_dtype", "int32"))
        grouped = type(group) is int and (group == PER_CHANNEL or group > 0)
        flags = {word: options.get(word, word == "sym") for word in ("sym", "desc_act", "lm_head")}
        for word, value, known, hint in (
            ("bits", bits, type(bits) is int and bits in BITS, "GPTQ with 4 or 8 bits is"),
            ("group_size", group, grouped, "-1 or a positive number is"),
            ("checkpoint_format", form, form in ("gptq", "gptq_v2"), "'gptq' and 'gptq_v2' are"),
            ("pack_dtype", packed, packed == "int32", "'int32' is"),
            *((word, flag, flag in (True, False), "true or false is") for word, flag in flags.items()),
        ):
            require(known, f"{label}: {word}={value!r:.80} is not supported: {hint}")
        return cls(cast(int, bits), cast(int, group), bool(flags["sym"]), bool(flags["desc_act"]), cast(Format, form))

    def group_of(self, in_features: int) -> int:
        return in_features if self.group_size == PER_CHANNEL else min(self.group_size, in_features)

    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Shapes of the tensors that stand for a weight [rows, columns]."""
        count, groups = WORD // self.bits, -(-columns // self.group_of(columns))
        shapes = {"qweight": (columns // count, rows), "qzeros": (groups, rows // count), "scales": (groups, rows)}
        return {**shapes, "g_idx": (columns,)}


class Description:
    """base: how layers are stored; file_name: that of the weights, if it is said.
    GPTQModel's `dynamic` has patterns for the names of layers, from their beginning on: those of `-:pattern` are not
    quantised; those of `+:pattern` or `pattern` have other settings. `-:` goes first; then the first that matches."""

    def __init__(self, label: str, options: Mapping[str, Any]) -> None:
        method = options.get("quant_method") or options.get("method") or "gptq"
        hint = "GPTQ is, NF4 of bitsandbytes, and models that are not quantised"
        require(str(method).lower() == "gptq", f"{label}: quant_method {method!r:.80} is not supported: {hint}")
        self.label, found = label, settings(label, options, OF_ALL)
        self.base, self.file_name = Stored.from_dict(label, found), found.get("model_file_base_name")
        dynamic = found.get("dynamic", {})
        require(isinstance(dynamic, Mapping), f"{label}: dynamic={dynamic!r:.80} is no object")
        require(sum(map(len, dynamic)) <= 50 * MOST, f"{label}: dynamic has too many patterns, {len(dynamic)}")
        self._rules: list[tuple[Any, Stored | None]] = []
        for pattern in sorted(dynamic, key=lambda pattern: not pattern.startswith("-:")):
            label, changes = f"{self.label}: dynamic {pattern!r:.80}", dynamic[pattern] or {}
            require(isinstance(changes, Mapping), f"{label} holds {changes!r:.80}, no settings")
            own = found | settings(label, changes, OF_A_LAYER)
            stored = None if pattern.startswith("-:") else Stored.from_dict(label, own)
            self._rules.append((_compile(label, pattern), stored))
        self._seconds, self.of = SECONDS, functools.cache(self._of)

    def _of(self, layer: str) -> Stored | None:
        """How a layer such as `model.layers.3.mlp.down_proj` is stored; None: it is not quantised."""
        for pattern, stored in self._rules:
            start = time.thread_time()
            try:
                matched = pattern.match(layer, timeout=SECONDS)
            except TimeoutError:
                matched, start = None, -math.inf
            self._seconds -= time.thread_time() - start
            hint = "takes too long to match: give a simpler pattern"
            require(self._seconds >= 0, f"{self.label}: dynamic {pattern.pattern!r:.80} {hint}")
            if matched:
                return stored
        return self.base


def settings(label: str, options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Those that are not null, under their usual words; `UserError` for one that is on and may change the weights."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        word = "checkpoint_format" if key.lower() in FORMAT_WORDS else OTHER_WORDS.get(key.lower(), key.lower())
        fine = not value or word in known or word in HARMLESS or (word, value) == ("data_type", "int")
        require(fine, f"{label}: {key!r:.80}={value!r:.80} is not supported: it may change what the weights are")
        if value is not None and word in known:
            found[word] = value
    return found


def _compile(label: str, pattern: str) -> Any:
    """By `regex`, which is nearer to GPTQModel's PCRE than `re`, and which can stop."""
    import regex  # pyright: ignore[reportMissingTypeStubs]

    text = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
    repetitions = math.prod(max(1, int(count)) for count in re.findall(r"[{,](\d+)", text[:MOST]))
    recursive = re.search(r"\(\?(?![:=!]|<[=!]|[imsx]+[:)])", text)
    simple = max(len(text), repetitions) <= MOST and not recursive
    require(simple, f"{label} is too long, repeats too often, or calls itself: give a simpler pattern")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise UserError(f"{label} is no regular expression: {one_line(error)}") from error
