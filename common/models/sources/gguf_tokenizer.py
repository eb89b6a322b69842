"""A GGUF file's tokenizer: byte-level BPE, rebuilt from vocabulary, merges and the name of the pre-tokenizer."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE

from common.text.chat_template import gguf_templates
from common.text.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type

# How a text is cut into words before merging, as the models' own tokenizer.json files give it.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of_words])


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "gpt2"):
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name == "qwen2":
        return _words(_QWEN2_WORDS)
    if name in ("llama-bpe", "llama3", "llama-v3"):
        return _words(_LLAMA3_WORDS)
    return None


def build_tokenizer(name: str, metadata: Mapping[str, Any], eos_token_ids: Sequence[int]) -> Tokenizer | None:
    """None, with a warning, where the file's tokenizer is of a kind that this cannot rebuild exactly: the model still
    serves prompts of token ids."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    texts: list[str] | None = get("tokens")
    if not texts:
        return None
    kind, words = get("model"), get("pre", "")
    pre_tokenizer = _pre_tokenizer(words)
    if kind != "gpt2" or pre_tokenizer is None:
        warnings.warn(
            f"{name}: its tokenizer (model {kind!r}, pre-tokenizer {words!r}) is not supported, "
            "so prompts must be token ids; or convert the model to a Hugging Face folder",
            stacklevel=2,
        )
        return None
    is_llama3 = words in ("llama-bpe", "llama3", "llama-v3")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", [])]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    backend = FastTokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3))  # pyright: ignore[reportArgumentType]
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    types: list[int] = get("token_type", [])
    for token_id, token_type in enumerate(types):
        if token_type in (_CONTROL, _USER_DEFINED):
            control = token_type == _CONTROL
            token = AddedToken(texts[token_id], special=control, normalized=False)
            backend.add_special_tokens([token]) if control else backend.add_tokens([token])
    special = {
        f"{key}_token": texts[token_id] for key in ("bos", "eos") if (token_id := get(f"{key}_token_id")) is not None
    }
    bos = special.get("bos_token")
    if bos is not None and get("add_bos_token", is_llama3):
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(backend, eos_token_ids, gguf_templates(metadata), special)
