"""Tokenizer files as folders have them: what tokenizer.json has, and what only a file beside it says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.models import reference
from tests.variants import variant

CORPUS = [
    "The capital of France is Paris. It's a wonderful city, isn't it? They'll say: hello world!",
    "user assistant system Hello there, how are you today? one two three four five",
    "naïve café 今天天气很好 def f(x):\n    return x ** 2\n\n",
] * 20
PROMPTS = [
    "The capital of France is",
    "  two leading spaces, a\ttab and trailing  ",
    "",
    " ",
    "\n\nlines\n",
    "Hello<|im_end|>\n<|im_start|>user\nHi <|im_end|> there<s>x</s> y <unk>",
    "<extra> <extra>a<extra>b <MORE> <more>tail <tool><tool> <image>x",
    "naïve café e\u0301 今天天气很好 🤖👩‍👩‍👧‍👦 ﬁ İ",
    "it's isn't they'll , . ! ? 'm",
    "\u00a0nbsp \u200b \ufffd \x00\x07 <0x41>",
]
"""Also with the special tokens that a variant may have in their middle."""
SPARE = 48
"""Rows of the embedding that no token has yet."""


@functools.cache
def trained(kind: str) -> str:
    """tokenizer.json of a small tokenizer. Special tokens in it: <s>, </s>, <unk>."""
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    first: list[str | AddedToken] = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=340, special_tokens=first, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=first, show_progress=False)
    else:
        sentencepiece = kind == "sentencepiece"
        model: Any = (
            models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True) if sentencepiece else models.Unigram()
        )
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(content=" ", left=1)]
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        if sentencepiece:
            trainer = trainers.BpeTrainer(
                vocab_size=400, special_tokens=[*first, *octets], max_token_length=8, show_progress=False
            )
        else:
            trainer = trainers.UnigramTrainer(
                vocab_size=160, special_tokens=first, unk_token="<unk>", show_progress=False
            )
    words = [part for line in CORPUS for part in line.split()] if kind == "sentencepiece" else CORPUS
    backend.train_from_iterator(words, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    if kind == "unigram":  # its trainer knows no bytes
        state["model"]["vocab"] += [[octet, -50.0] for octet in octets]
        state["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    if kind != "byte-level":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


def token(text: str, **changes: bool) -> dict[str, Any]:
    """A token as the files store it."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, **plain, **changes}


def by_id(first: int, *tokens: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`added_tokens_decoder`, with the three that tokenizer.json has."""
    all_tokens = enumerate([token(text) for text in ("<unk>", "<s>", "</s>")])
    return {str(i): {"special": True, **t} for i, t in [*all_tokens, *enumerate(tokens, first)]}


CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
SIZES = {"byte-level": 340, "sentencepiece": 400, "unigram": 346, "wordpiece": 146}
Files = dict[str, dict[str, Any]]

FOLDERS: dict[str, tuple[str, Files]] = {
    "tokenizer.json alone": ("byte-level", {}),
    "nothing new in the files beside it": (
        "byte-level",
        {
            CONFIG: {**GENERIC, "eos_token": "</s>", "added_tokens_decoder": by_id(340)},
            NAMES: {"bos_token": token("<s>")},
        },
    ),
    "nothing new, and empty lists": (
        "byte-level",
        {
            CONFIG: {**GENERIC, "additional_special_tokens": [], "extra_special_tokens": [], "image_token": []},
            NAMES: {"additional_special_tokens": [], "extra_special_tokens": {}},
        },
    ),
    "nothing new, and empty objects": ("byte-level", {CONFIG: {**GENERIC, "extra_special_tokens": {}}}),
    "names as text in special_tokens_map": (
        "byte-level",
        {CONFIG: GENERIC, NAMES: {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<more>"}},
    ),
    "names as objects that take spaces": (
        "sentencepiece",
        {
            CONFIG: GENERIC,
            NAMES: {"eos_token": token("<|im_end|>", lstrip=True), "pad_token": token("<more>", rstrip=True)},
        },
    ),
    "additional_special_tokens in special_tokens_map": (
        "unigram",
        {CONFIG: GENERIC, NAMES: {"additional_special_tokens": ["<extra>", "<|im_end|>"]}},
    ),
    "additional_special_tokens in tokenizer_config": (
        "sentencepiece",
        {CONFIG: {**GENERIC, "additional_special_tokens": ["<extra>", "<|im_start|>"]}},
    ),
    "extra_special_tokens as a list": (
        "byte-level",
        {CONFIG: {**GENERIC, "extra_special_tokens": ["<extra>", "<more>"]}},
    ),
    "extra_special_tokens by name": (
        "byte-level",
        {CONFIG: {**GENERIC, "extra_special_tokens": {"image_token": "<image>", "boi_token": "<extra>"}}},
    ),
    "extra_special_tokens by name in special_tokens_map": (
        "sentencepiece",
        {CONFIG: GENERIC, NAMES: {"extra_special_tokens": {"image_token": "<image>"}}},
    ),
    "a name of the model's own": ("byte-level", {CONFIG: {**GENERIC, "image_token": "<image>", "eos_token": "</s>"}}),
    "added_tokens.json alone": ("byte-level", {ADDED: {"<|im_end|>": 340, "<more>": 341}}),
    "added_tokens.json, some of them special": (
        "sentencepiece",
        {CONFIG: GENERIC, ADDED: {"<more>": 401, "<|im_end|>": 400}, NAMES: {"eos_token": "<|im_end|>"}},
    ),
    "added_tokens.json of what is there": ("unigram", {CONFIG: GENERIC, ADDED: {"</s>": 2}}),
    "added_tokens_decoder": (
        "byte-level",
        {
            CONFIG: {
                **GENERIC,
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": by_id(
                    340,
                    token("<|im_start|>"),
                    token("<|im_end|>"),
                    token("<tool>", special=False, normalized=True),
                    token("<more>", special=False, lstrip=True),
                ),
            }
        },
    ),
    "added_tokens_decoder that changes how a token is read": (
        "byte-level",
        {CONFIG: {**GENERIC, "added_tokens_decoder": {"2": token("</s>", special=True, lstrip=True, rstrip=True)}}},
    ),
    "added_tokens_decoder beside older files that say other things": (
        "sentencepiece",
        {
            CONFIG: {**GENERIC, "eos_token": "</s>", "added_tokens_decoder": by_id(400, token("<extra>"))},
            NAMES: {"eos_token": "<|im_end|>", "additional_special_tokens": ["<tool>"]},
            ADDED: {"<more>": 999},
        },
    ),
    "eos_token only in tokenizer_config": ("byte-level", {CONFIG: {**GENERIC, "eos_token": "<|im_end|>"}}),
    "eos_token as an object of transformers": (
        "byte-level",
        {CONFIG: {**GENERIC, "eos_token": {"__type": "AddedToken", **token("<|im_end|>", lstrip=True)}}},
    ),
    "add_bos_token beside tokenizer.json": (
        "byte-level",
        {CONFIG: {**GENERIC, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}},
    ),
    "split_special_tokens": ("byte-level", {CONFIG: {**GENERIC, "split_special_tokens": True}}),
    "clean_up_tokenization_spaces with BPE": (
        "sentencepiece",
        {CONFIG: {**GENERIC, "clean_up_tokenization_spaces": True}},
    ),
    "clean_up_tokenization_spaces without BPE": (
        "unigram",
        {CONFIG: {**GENERIC, "clean_up_tokenization_spaces": True}},
    ),
    "WordPiece": ("wordpiece", {CONFIG: {**GENERIC, "additional_special_tokens": ["<extra>"]}}),
    "Qwen2Tokenizer": (
        "byte-level",
        {CONFIG: {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}, "config.json": {"model_type": "qwen2"}},
    ),
    "generic class with qwen2": ("byte-level", {CONFIG: GENERIC, "config.json": {"model_type": "qwen2"}}),
    "no class with qwen3": ("byte-level", {"config.json": {"model_type": "qwen3"}, NAMES: {"eos_token": "<|im_end|>"}}),
    "class in config.json": (
        "byte-level",
        {CONFIG: {}, "config.json": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}},
    ),
    "GPT2TokenizerFast with add_prefix_space": (
        "byte-level",
        {CONFIG: {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "eos_token": "</s>"}},
    ),
    "LlamaTokenizer": ("sentencepiece", {CONFIG: {"tokenizer_class": "LlamaTokenizer", "legacy": True}}),
    "LlamaTokenizerFast without add_prefix_space": (
        "sentencepiece",
        {CONFIG: {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False, "add_bos_token": False}},
    ),
    "LlamaTokenizer with bytes": ("byte-level", {CONFIG: {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}}),
    "a class that transformers does not know": ("byte-level", {CONFIG: {"tokenizer_class": "OurTokenizer"}}),
    "vocab.json and merges.txt": (
        "byte-level",
        {
            CONFIG: {"tokenizer_class": "Qwen2Tokenizer"},
            "config.json": {"model_type": "qwen2"},
            ADDED: {"<|im_end|>": 340},
            NAMES: {"eos_token": "<|im_end|>"},
            "vocab.json": {},
        },
    ),
}
"""Name to (kind of tokenizer, files beside tokenizer.json)."""


def write(name: str, folder: Path) -> Path:
    """The tokenizer files, with a config.json of a Llama unless they have one."""
    kind, files = FOLDERS[name]
    state = json.loads(trained(kind))
    for file, content in {"config.json": {"model_type": "llama"}, **files}.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    if "vocab.json" in files:
        (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]), encoding="utf-8")
        merges = [" ".join(pair) for pair in state["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def _with_model(name: str) -> Callable[[Path], Path]:
    """The folder with weights."""

    def make(folder: Path) -> Path:
        kind, files = FOLDERS[name]
        family = {"qwen2": "qwen2", "qwen3": "qwen3, head_dim unlike hidden/heads"}
        model_type = files.get("config.json", {}).get("model_type", "llama")
        model = reference.make(family.get(model_type, "llama, 3 queries a KV head"), vocab_size=SIZES[kind] + SPARE)
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        write(name, folder)
        config = {**saved, **files.get("config.json", {})}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def _damaged(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file, content = DAMAGED[name]
        _with_model("tokenizer.json alone")(folder)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


DAMAGED: dict[str, tuple[str, Any]] = {
    "special_tokens_map.json cut off": (NAMES, '{"bos_token": '),
    "special_tokens_map.json a list": (NAMES, ["<s>"]),
    "special_tokens_map.json with a number": (NAMES, {"bos_token": 5}),
    "special_tokens_map.json with a list of numbers": (NAMES, {"additional_special_tokens": [5]}),
    "special_tokens_map.json with a number for a list": (NAMES, {"additional_special_tokens": 5}),
    "special_tokens_map.json with an object that has no text": (NAMES, {"eos_token": {"lstrip": True}}),
    "added_tokens.json cut off": (ADDED, '{"<more>": 340'),
    "added_tokens.json a list": (ADDED, ["<more>"]),
    "added_tokens.json with a list for an id": (ADDED, {"<more>": [340]}),
    "added_tokens.json with a truth value": (ADDED, {"<more>": True}),
    "added_tokens.json with a negative id": (ADDED, {"<more>": -1}),
    "added_tokens.json with another's id": (ADDED, {"<more>": 3}),
    "added_tokens.json with one id twice": (ADDED, {"<more>": 340, "<extra>": 340}),
    "added_tokens.json with a gap": (ADDED, {"<more>": 340, "<extra>": 342}),
    "added_tokens.json far beyond the vocabulary": (ADDED, {"<more>": 10**12}),
    "added_tokens_decoder a list": (CONFIG, {"added_tokens_decoder": [token("<more>")]}),
    "added_tokens_decoder with a name for an id": (CONFIG, {"added_tokens_decoder": {"more": token("<more>")}}),
    "added_tokens_decoder with a gap": (CONFIG, {"added_tokens_decoder": {"350": token("<more>")}}),
    "added_tokens_decoder with another's id": (CONFIG, {"added_tokens_decoder": {"2": token("<more>")}}),
    "added_tokens_decoder without text": (CONFIG, {"added_tokens_decoder": {"340": {"lstrip": False}}}),
    "extra_special_tokens a number": (CONFIG, {"extra_special_tokens": 5}),
    "tokenizer_config.json nested deep": (CONFIG, '{"a":' + "[" * 200_000),
    "a name that is no text": (CONFIG, {"eos_token": 2}),
    "a name that is an empty list": (CONFIG, {"eos_token": []}),
    "a name that is a list": (CONFIG, {"eos_token": ["</s>"]}),
    "a name that is an empty object": (CONFIG, {"eos_token": {}}),
    "tokenizer_class a number": (CONFIG, {"tokenizer_class": 7}),
}
"""Name to the damaged file and what it holds, beside a good tokenizer.json."""

for _name in FOLDERS:
    variant(f"tokenizers: {_name}")(_with_model(_name))
for _name, (_file, _) in DAMAGED.items():
    variant(f"tokenizers: {_name}", refused=_file)(_damaged(_name))
