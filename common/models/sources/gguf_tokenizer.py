"""A GGUF file's tokenizer, rebuilt with the `tokenizers` library: SentencePiece, or byte-level BPE.
Its tokens are llama.cpp's for the same file: Unicode is not normalised, though some models' own files do so."""

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

# How a text is cut into words before merging: each pattern cuts what those before it left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (  # as transformers has it; llama.cpp's, which takes every letter but a-z for a capital, is an approximation
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (  # its first models: letters of the alphabets with capitals that Unicode had then; punctuation; Chinese
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FA}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1DF1E}]]+",
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
    r"\p{N}+",
)
_WORDS = {
    "gpt-2 gpt2 phi-2 a.x-4.0 mellum exaone4 trillion jais": (_GPT2,),
    "smollm starcoder refact codeshell exaone minerva-7b command-r": (r"\p{N}", _GPT2),
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 smaug-bpe dbrx": (_LLAMA3,),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan": (_QWEN2,),
    "qwen35": (_QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}"),),
    "seed-coder": (_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),),
    "tekken": (_TEKKEN,),
    "deepseek-llm": _DEEPSEEK,
    "deepseek-coder": (_DEEPSEEK[0], r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK[4], r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""By the names of tokenizer.ggml.pre that occur with these architectures."""
_WHOLE_WORDS_AND_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "tekken"}
"""Take a word that is a token without merging, and begin each prompt with a BOS."""


def build_tokenizer(m: Metadata, config: ModelConfig) -> Tokenizer | None:
    """None, said in a line, where it cannot be rebuilt exactly: token ids still do. Raises for a damaged one."""
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(m.get(f"{_AT}tokens", list[str]) or [])]
    if not texts:
        return None
    kind, words = m.get(f"{_AT}model", str), m.get(f"{_AT}pre", str) or "default"
    patterns = next((patterns for names, patterns in _WORDS.items() if words in names.split()), ())
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


def _byte_level(m: Metadata, vocab: dict[str, int], words: str, patterns: tuple[str, ...]) -> FastTokenizer:
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
