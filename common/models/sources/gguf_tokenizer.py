"""A GGUF file's tokenizer, rebuilt with the `tokenizers` library: SentencePiece, or byte-level BPE.
Its tokens are llama.cpp's for the same file: Unicode is not normalised, though some models' own files do so."""

import tomllib
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from common.models.config import ModelConfig
from common.models.sources.gguf_keys import token_id
from common.models.sources.gguf_reader import Metadata
from common.text.chat_template import gguf_templates
from common.text.tokenizer import Tokenizer
from common.text.turn_ends import TURN_ENDS
from common.watch.progress import say

_UNKNOWN, _USER_DEFINED, _LAST_TYPE = 2, 4, 6  # values of tokenizer.ggml.token_type; 3: control
_PLAIN_TEXT = {"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}  # Ends of turns only where the file says so

_AT = "tokenizer.ggml."
_READ = "model pre tokens token_type scores merges add_bos_token add_eos_token add_space_prefix"
_IDS = {"bos_token": ("bos", 1), "eos_token": ("eos", 2), "unk_token": ("unknown", 0), "pad_token": ("padding", None)}
"""In chat templates and in the metadata; and SentencePiece's where the file has none."""

_CUTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_WORDS: dict[str, list[str]] = {name: cut["patterns"] for cut in _CUTS["words"] for name in cut["names"]}
_WHOLE_WORDS_AND_BOS: list[str] = _CUTS["whole_words_and_bos"]


def build_tokenizer(m: Metadata, config: ModelConfig) -> Tokenizer | None:
    """None, said in a line, where it cannot be rebuilt exactly: token ids still do. Raises for a damaged one."""
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(m.get(f"{_AT}tokens", list[str]) or [])]
    if not texts:
        return None
    kind, words = m.get(f"{_AT}model", str), m.get(f"{_AT}pre", str) or "default"
    patterns = _WORDS.get(words, [])
    keys = [key.removeprefix(_AT) for key, value in m.values.items() if key.startswith(_AT) and value is not False]
    unread = ", ".join(["", *(key for key in keys if key not in _READ.split() and not key.endswith("_token_id"))])[:80]
    if kind not in ("gpt2", "llama") or unread or (kind == "gpt2" and not patterns):
        hint = "so prompts must be token ids; or convert the model to a Hugging Face folder"
        say(f"{m.name}: its tokenizer ({kind!r:.80}, pre {words!r:.80}{unread}) is not supported, {hint}")
        return None
    vocab, spm = {text: i for i, text in enumerate(texts)}, kind == "llama"
    m.require(len(vocab) == len(texts), f"{len(texts) - len(vocab)} tokens are there twice")
    m.require(len(texts) <= config.vocab_size, f"{len(texts)} tokens are more than the {config.vocab_size} embeddings")
    types = m.need(f"{_AT}token_type", np.ndarray, np.ones(len(texts), int))
    valid = types.dtype.kind in "iu" and len(types) == len(texts) and 0 <= types.min() <= types.max() <= _LAST_TYPE
    m.require(valid, f"{_AT}token_type is not one type a token")
    ids = {key: token_id(m, name, len(texts), i if spm else None) for key, (name, i) in _IDS.items()}
    special = {key: texts[i] for key, i in ids.items() if i is not None}
    backend = _sentencepiece(m, vocab, special.get("unk_token")) if spm else _byte_level(m, vocab, words, patterns)
    control = {vocab[text] for text in special.values()} | {i for i in config.eos_token_ids if i < len(texts)}
    control |= {vocab[text] for text in TURN_ENDS - _PLAIN_TEXT if text in vocab}
    control |= set(np.flatnonzero((types >= _UNKNOWN) & (types < _USER_DEFINED)).tolist())
    user_defined = set(np.flatnonzero(types == _USER_DEFINED).tolist()) - control
    backend.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in sorted(control)])
    backend.add_tokens([AddedToken(texts[i], normalized=False) for i in sorted(user_defined)])
    begin = m.need(f"{_AT}add_bos_token", bool, spm or words in _WHOLE_WORDS_AND_BOS)
    end = m.need(f"{_AT}add_eos_token", bool, False)
    m.require(special.keys() >= {*["bos_token"] * begin, *["eos_token"] * end}, "it does not name its BOS or EOS")
    before, after = [special["bos_token"]] if begin else [], [special["eos_token"]] if end else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[*before, "$A", *after], special_tokens=[(text, vocab[text]) for text in {*before, *after}]
        )
    return Tokenizer(backend, config.eos_token_ids, gguf_templates(m.values), special)


def _byte_level(m: Metadata, vocab: dict[str, int], words: str, patterns: list[str]) -> FastTokenizer:
    if words == "default":
        hint = "which may not be as in training. Convert the model again, or take its Hugging Face folder"
        say(f"{m.name} does not say how its tokenizer cuts words ({_AT}pre): it is done as llama.cpp does then, {hint}")
    merges = [tuple(merge.split(" ", 1)) for merge in m.need(f"{_AT}merges", list[str])]
    wrong = [p for p in merges if len(p) < 2 or p[0] not in vocab or p[1] not in vocab or p[0] + p[1] not in vocab]
    m.require(not wrong, f"merge {' '.join(*wrong[:1] or [''])[:80]!r} is not of two tokens that make a third")
    whole = words in _WHOLE_WORDS_AND_BOS
    backend = FastTokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=whole))  # pyright: ignore[reportArgumentType]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(m: Metadata, vocab: dict[str, int], unknown: str | None) -> FastTokenizer:
    """SentencePiece merges those two neighbours whose token has the highest score; `tokenizers` has a list of pairs
    instead: here, of every two tokens that make a third."""
    scores = m.need(f"{_AT}scores", np.ndarray).astype(float)
    valid = len(scores) == len(vocab) and bool(np.isfinite(scores).all())
    m.require(valid, f"{_AT}scores is not one number a token")
    own, letters = {text: text for text in vocab}, sum(map(len, vocab))
    left, pairs = 4096 + 32 * letters, list[tuple[float, int, str, str]]()  # real vocabularies have 3 times as many
    for text, score in zip(vocab, scores.tolist(), strict=True):
        m.require(len(text) <= 2048 and letters <= 4 << 20 and left >= 0, f"{_AT}tokens has absurdly long ones")
        for cut in range(1, len(text)):
            first, second = own.get(text[:cut]), own.get(text[cut:])
            if first is not None and second is not None:
                pairs.append((score, cut, first, second))
                left -= len(text)
    merges = [pair[2:] for pair in sorted(pairs, key=lambda pair: pair[:2], reverse=True)]
    backend = FastTokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = m.need(f"{_AT}add_space_prefix", bool, True)  # in front of each part between control tokens
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    back += [decoders.Strip(" ", 1, 0)] * prefix
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(back)  # pyright: ignore[reportAttributeAccessIssue]
    return backend
