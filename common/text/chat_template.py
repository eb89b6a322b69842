"""A model's own chat template: where a folder keeps it, and the text that it makes of a conversation."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line

ROLES = ("system", "user", "assistant", "tool")


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The conversation as text, up to where the assistant's answer begins."""
    _check_messages(messages)
    try:
        return _compile(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=True, **special_tokens
        )
    except Exception as error:  # the template is a program from the model's folder: it can fail in any way
        raise UserError(f"the model's chat template refuses these messages: {one_line(error)}") from error


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise UserError("a chat needs at least one message, such as {'role': 'user', 'content': 'Hello'}")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"unknown role {role!r} in a chat message. Choose from: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"a chat message needs text as its 'content', not {type(content).__name__}")


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> Any:
    """A chat template comes from a model file, so it runs in a sandbox, with the functions that such templates use.
    Cached: compiling takes as long as a short prompt's prefill."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment: Any = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template)


def read_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    """chat_template.jinja in newer folders; in older ones part of tokenizer_config.json: one text, or named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}. Download it again") from error
    template = options.get("chat_template")
    if isinstance(template, list):
        try:
            named: dict[str, str] = {entry["name"]: entry["template"] for entry in template}  # pyright: ignore
        except (TypeError, KeyError):
            where = folder / "tokenizer_config.json"
            raise UserError(f"{where}: each chat_template of a list needs a name and a template") from None
        return named.get("default")
    return template if isinstance(template, str) else None
