"""Chat templates: of several names and places, which render; and hostile ones, each refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from tests.text.test_chat_template import HOSTILE, NAMED, TEMPLATES
from tests.variants import Make, variant

CHATML = TEMPLATES["chatml"]


def _folder(folder: Path, **options: Any) -> Path:
    """A small Llama with a tokenizer of single bytes."""
    shape = {"vocab_size": 258, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder)  # pyright: ignore
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = FastTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **options}))
    return folder


def _with_files(files: dict[str, str], **options: Any) -> Make:
    def make(folder: Path) -> Path:
        _folder(folder, **options)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return make


def _add(name: str, make: Callable[[Path], Path], refused: str | None = None) -> None:
    variant(f"templates: {name}", refused)(make)


for _name in ("chatml", "generation", "no tools", "tojson"):
    _add(_name, _with_files({}, chat_template=TEMPLATES[_name]))
_add("named ones", _with_files({}, chat_template=NAMED))
_add("null", _with_files({}, chat_template=None))
_add("chat_template.jinja", _with_files({"chat_template.jinja": CHATML}))
_add("chat_template.json", _with_files({"chat_template.json": json.dumps({"chat_template": CHATML})}))
_add(
    "additional ones",
    _with_files({"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": "{{ tools|tojson }}"}),
)
for _name, _template in {
    "a syntax error": "{% for %}",
    "an unknown filter": "{{ messages|nofilter }}",
    "an unknown test": "{{ messages is notest }}",
    "an unknown tag": "{% nonsense %}",
    "too deep": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "too many blocks": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "too much code": "{{a}}" * 13000,
    "too long": "x" * 2_000_000,
}.items():
    _add(f"does not compile, {_name}", _with_files({}, chat_template=_template), "does not compile: .*--chat-template")
_add("does not compile, a named one", _with_files({}, chat_template=[*NAMED, {"name": "x", "template": "{% if"}]),
     "does not compile")  # fmt: skip
_add("does not compile, a file", _with_files({"chat_template.jinja": "{% if"}), "does not compile")
for _value in (5, True, {"default": 5}, ["text"], [{"name": "x"}]):
    _add(f"no text, {json.dumps(_value)}", _with_files({}, chat_template=_value), r"tokenizer_config\.json")
_add(
    "a file that is no text",
    lambda folder: _bytes(folder, b"\xff\xfe\x00"),
    r"chat_template\.jinja is truncated",
)
_add("a huge file", lambda folder: _bytes(folder, b"x" * 200_000_000), "more than a megabyte")
for _name in ("text", "text in a condition", "power", "center", "nested loops", "nested lists"):
    _add(f"hostile, {_name}", _with_files({}, chat_template=HOSTILE[_name]))  # nothing is computed before a chat


def _bytes(folder: Path, content: bytes) -> Path:
    (_folder(folder) / "chat_template.jinja").write_bytes(content)
    return folder
