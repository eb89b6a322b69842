"""A Hugging Face folder's tokenizer, with the ids and texts of transformers' `AutoTokenizer`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from common.errors import UserError, one_line, require

OWN, OPTIONS, NAMES, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
OLDER = ("vocab.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.txt")
LISTS = ("additional_special_tokens", "extra_special_tokens")
STANDARD = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
CLEAN = "clean_up_tokenization_spaces"
CLEAN_BPE = f"{CLEAN}_for_bpe_even_though_it_will_corrupt_output"
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What these options take the spaces out of, in this order."""


def read_backend(
    folder: Path, files: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[FastTokenizer, dict[str, str]] | None:
    """The fast tokenizer, and its special tokens by name; None where the folder has no tokenizer.

    files: contents of `OPTIONS`, `NAMES` and `ADDED`, {} where absent; config: of config.json.
    """
    if not any((folder / name).is_file() for name in (OWN, *OLDER)):
        return None
    if "added_tokens_decoder" in files[OPTIONS]:  # it replaces the two older files
        files = {**files, NAMES: {}, ADDED: {}}
    named, ids = list(_named(folder, files)), list(_ids(folder, files))
    if (folder / OWN).is_file():
        try:
            backend = FastTokenizer.from_file(str(folder / OWN))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{folder / OWN} cannot be read: {one_line(error)}. Download it again") from error
        _check_ids(folder, ids, backend)
        special = {name: text for name, text in named if name}
        if _is_plain(backend, files, config, special) and {text for _, text in named} <= _texts(backend):
            return backend, special
    backend, special = _from_transformers(folder, files[OPTIONS], config)
    _check_ids(folder, ids, backend)
    return backend, special


def _texts(backend: FastTokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _named(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Special tokens as (name or "", text); of the same name the last counts."""
    for file in (OPTIONS, NAMES):
        for key, value in files[file].items():
            where = f"{folder / file}: {key}"
            if key in LISTS and value is not None:
                require(isinstance(value, list | Mapping), f"{where} takes a list or an object, not {value!r:.100}")
                tokens: Any = value.items() if isinstance(value, Mapping) else [("", token) for token in value]
                yield from ((name, _text(token, where)) for name, token in tokens)
            elif key.endswith("_token") and value is not None and not isinstance(value, bool):  # not add_bos_token
                yield key, _text(value, where)


def _text(token: Any, where: str) -> str:
    fields: Mapping[str, Any] = token if isinstance(token, Mapping) else {"content": token}
    right = all(isinstance(value, str if key in ("content", "__type") else bool) for key, value in fields.items())
    require(right and "content" in fields, f"{where} takes a text, or a token with its 'content', not {token!r:.100}")
    return fields["content"]


def _ids(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str, str]]:
    """(token id, text, file) of the tokens that have their id in a file."""
    decoder = files[OPTIONS].get("added_tokens_decoder") or {}
    require(
        isinstance(decoder, Mapping), f"{folder / OPTIONS}: added_tokens_decoder is an object, not {decoder!r:.100}"
    )
    entries = [
        (token_id, _text(token, f"{folder / OPTIONS}: {token_id}"), OPTIONS) for token_id, token in decoder.items()
    ]
    for token_id, text, file in [*entries, *((token_id, text, ADDED) for text, token_id in files[ADDED].items())]:
        whole = str(token_id).isdecimal() and isinstance(token_id, int if file == ADDED else str)
        require(whole, f"{folder / file}: {text!r:.100} has the id {token_id!r:.100}, which is no whole number")
        yield int(token_id), text, file


def _check_ids(folder: Path, ids: list[tuple[int, str, str]], backend: FastTokenizer) -> None:
    """New tokens get the ids behind the vocabulary, whatever a file says: it must say the same."""
    new = backend.get_vocab_size()
    for token_id, text, file in sorted(ids):
        found = backend.token_to_id(text)
        found, new = (new, new + 1) if found is None else (found, new)
        problem = (
            f"{folder / file}: {text!r:.100} has the id {token_id}, and next to the other tokens it would be {found}"
        )
        require(found == token_id, f"{problem}: the file is damaged, or of another model")


def _is_plain(
    backend: FastTokenizer,
    files: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    special: Mapping[str, str],
) -> bool:
    """Would transformers add nothing to tokenizer.json? Known without importing it, which takes a second."""
    options, added = files[OPTIONS], backend.get_added_tokens_decoder()
    decoder: Mapping[str, Any] = options.get("added_tokens_decoder") or {}
    made_for = options.get("tokenizer_class") or config.get("tokenizer_class")
    changes = ("auto_map", "fast_tokenizer_files", "split_special_tokens", CLEAN_BPE)
    return (
        made_for in (None, "PreTrainedTokenizerFast", "TokenizersBackend")  # other classes change what they read
        and config.get("model_type") in ((None, "llama", "qwen3") if made_for else (None, "llama"))
        and not any(options.get(key) for key in changes)
        and (isinstance(backend.model, models.BPE) or not options.get(CLEAN))
        and special.keys() <= STANDARD
        and not files[ADDED]
        and all((own := added.get(int(i))) is not None and own.__getstate__() == token for i, token in decoder.items())
    )


def _from_transformers(
    folder: Path, options: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[FastTokenizer, dict[str, str]]:
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils import logging

    known: Any = None  # the model's own class of configuration would import its code and the half of PyTorch
    if "auto_map" not in options and (options.get("tokenizer_class") or config.get("tokenizer_class") or not config):
        known = PreTrainedConfig(name_or_path=str(folder))
        for key in ("model_type", "model_name", "tokenizer_class"):
            if config.get(key):
                setattr(known, key, config[key])
    objects = {key: token for key in STANDARD if isinstance(token := options.get(key), Mapping)}
    texts = {key: token["content"] for key, token in objects.items() if "__type" not in token}
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        made: Any = AutoTokenizer.from_pretrained(
            folder, config=known, local_files_only=True, trust_remote_code=False, **texts
        )
        backend: FastTokenizer = made.backend_tokenizer
        if getattr(made, CLEAN) and (getattr(made, CLEAN_BPE) or not isinstance(backend.model, models.BPE)):
            clean = [decoders.Replace(text, text.replace(" ", "")) for text in CLEANED]
            backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), *clean])
        return backend, dict(made.special_tokens_map)
    except Exception as error:  # of whatever kind
        files = ", ".join(name for name in (OWN, *OLDER, OPTIONS, NAMES, ADDED) if (folder / name).is_file())
        reason = one_line(error)[:200]
        raise UserError(f"{folder}: transformers makes no tokenizer of {files}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
