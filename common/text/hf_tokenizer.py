"""A Hugging Face folder's tokenizer, with the ids and texts of transformers' `AutoTokenizer`."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from common.errors import UserError, one_line, refusing, require
from common.text.json_file import check_file

OWN, OPTIONS, NAMES, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
OLDER = ("vocab.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.txt")
STANDARD = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_OTHERS = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|processor_config|preprocessor_config"
    r"|spiece|sentencepiece|tekken)[\w.-]*\.(json|txt|model|jinja|bpe)|.*\.tiktoken|tiktoken\.model"
)  # Files that a library may read
CLEAN = "clean_up_tokenization_spaces"
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # lose their spaces, in this order
Files = Mapping[str, Mapping[str, Any]]
Found = tuple[FastTokenizer, dict[str, str]]


def read_backend(folder: Path, files: Files, config: Mapping[str, Any]) -> Found | None:
    """The fast tokenizer, and its special tokens by name; None where the folder has no tokenizer.
    files: contents of `OPTIONS`, `NAMES` and `ADDED`, {} where absent; config: of config.json."""
    for path in folder.iterdir():
        if path.name == OWN or _OTHERS.fullmatch(path.name):
            check_file(path, *((48 << 20, 3_000_000) if path.name == OWN else (24 << 20, 1_500_000)))
    if not any((folder / name).is_file() for name in (OWN, *OLDER)):
        return None
    decoder: Any = files[OPTIONS].get("added_tokens_decoder", {})
    if "added_tokens_decoder" in files[OPTIONS]:  # it replaces the two older files
        files = {**files, NAMES: {}, ADDED: {}}
    named = {(file, key): list(_texts(value, f"{folder / file}: {key}")) for file, key, value in _entries(files)}
    with refusing(f"{folder / (ADDED if files[ADDED] else OPTIONS)}"):
        ids = [(int(i), token["content"], folder / OPTIONS) for i, token in decoder.items()]
        ids += [(int(i), text, folder / ADDED) for text, i in files[ADDED].items()]
    if (folder / OWN).is_file():
        with refusing(f"{folder / OWN}"):
            backend = FastTokenizer.from_file(str(folder / OWN))
        _check_ids(ids, backend, config)
        added = backend.get_added_tokens_decoder()
        same = all((own := added.get(int(i))) and own.__getstate__() == token for i, token in decoder.items())
        texts = {text for texts in named.values() for text in texts}
        if _is_plain(backend, files, config) and same and texts <= {token.content for token in added.values()}:
            return backend, {key: texts[0] for (_, key), texts in named.items() if key in STANDARD}
    backend, special = _from_transformers(folder, files[OPTIONS], config)
    _check_ids(ids, backend, config)
    return backend, special


def _entries(files: Files) -> Iterator[tuple[str, str, Any]]:
    """(file, key, value) of what names special tokens."""
    for file in (OPTIONS, NAMES):
        for key, value in files[file].items():
            empty = value is None or isinstance(value, bool) or (value in ([], {}) and key not in STANDARD)
            if key.endswith(("_token", "_special_tokens")) and not empty:
                yield file, key, value


def _texts(value: Any, where: str) -> Iterator[str]:
    """Of a token, as text or as an object with it as 'content', or of a list or an object of tokens."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and "content" in value:
        yield from _texts(value["content"], where)
    else:
        require(isinstance(value, list | Mapping), f"{where} takes the text of a token, not {value!r:.100}")
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner, where)


def _check_ids(ids: list[tuple[int, str, Path]], backend: FastTokenizer, config: Mapping[str, Any]) -> None:
    """New tokens get the ids behind the vocabulary, whatever a file says: it must say the same. No id is far beyond
    the model's: writing a tokenizer takes memory for all ids up to the largest."""
    vocab, size = backend.get_vocab(), config.get("vocab_size")
    most = max(len(vocab), size if isinstance(size, int) else 0) + 65536
    wrong = max(vocab, key=vocab.__getitem__, default="")
    far = f"the token {wrong!r:.100} has the id {vocab.get(wrong)}, of {len(vocab)} tokens"
    require(vocab.get(wrong, 0) < most, f"{far}: the tokenizer is damaged, or of another model")
    new = backend.get_vocab_size()
    for token_id, text, path in sorted(ids):
        found = backend.token_to_id(text)
        found, new = (new, new + 1) if found is None else (found, new)
        wrong = f"{path}: {text!r:.100} has the id {token_id}, and next to the other tokens it can only be {found}"
        require(found == token_id, f"{wrong}: the file is damaged, or of another model")


def _is_plain(backend: FastTokenizer, files: Files, config: Mapping[str, Any]) -> bool:
    """Does transformers take tokenizer.json as it is? Known without importing it, which takes a second."""
    options = files[OPTIONS]
    made_for = options.get("tokenizer_class") or config.get("tokenizer_class")  # most classes change what they read
    return (
        made_for in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
        and config.get("model_type") in ((None, "llama", "qwen3") if made_for else (None, "llama"))
        and not any(options.get(key) for key in ("auto_map", "fast_tokenizer_files", "split_special_tokens"))
        and (isinstance(backend.model, models.BPE) or not options.get(CLEAN))
        and all(
            (key in STANDARD) == (isinstance(value, str | Mapping) and value != {}) for _, key, value in _entries(files)
        )
        and not files[ADDED]
    )


def _from_transformers(folder: Path, options: Mapping[str, Any], config: Mapping[str, Any]) -> Found:
    lacks = not (folder / OWN).is_file() and (folder / "tokenizer.model").is_file() and not find_spec("sentencepiece")
    require(not lacks, f"{folder} has tokenizer.model and no {OWN}, which takes a library: pip install sentencepiece")
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils import logging

    known: Any = None  # the model's own class of configuration would import its code and half of PyTorch
    if "auto_map" not in options and (options.get("tokenizer_class") or config.get("tokenizer_class") or not config):
        known = PreTrainedConfig()
        vars(known).update({key: config[key] for key in ("model_type", "tokenizer_class") if config.get(key)})
    objects = {key: token for key in STANDARD if isinstance(token := options.get(key), Mapping)}
    texts = {key: token["content"] for key, token in objects.items() if "content" in token and "__type" not in token}
    verbosity = logging.get_verbosity()
    logging.set_verbosity(50)  # only what is critical
    try:
        made: Any = AutoTokenizer.from_pretrained(
            folder, config=known, local_files_only=True, trust_remote_code=False, **texts
        )
        backend: FastTokenizer = made.backend_tokenizer
        if getattr(made, CLEAN) and not isinstance(backend.model, models.BPE):
            clean = [decoders.Replace(text, text.replace(" ", "")) for text in CLEANED]
            backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), *clean])
        return backend, dict(made.special_tokens_map)
    except Exception as error:  # of whatever kind
        files = ", ".join(name for name in (OWN, *OLDER, OPTIONS, NAMES, ADDED) if (folder / name).is_file())
        reason = one_line(error)[:200]
        raise UserError(f"{folder}: transformers makes no tokenizer of {files}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
