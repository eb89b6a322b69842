"""A model's own chat templates: where a folder or a file keeps them, and the text that one makes of a conversation.
transformers renders them, within the limits of `template_sandbox`. Both take time to import: only where needed."""

import functools
import json
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line, refusing, require

Templates = str | Mapping[str, str]  # One, or several by name: `default` for all chats, `tool_use` for those with tools
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # A template may name others
OPTION = "--chat-template FILE (chat_template= in Python)"
RESERVED = ("conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
            "continue_final_message", "return_assistant_tokens_mask")  # fmt: skip


def render(
    templates: Templates | None, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any],
    tools: Sequence[Any] | None = None, documents: Sequence[Any] | None = None,
) -> str:  # fmt: skip
    """The conversation as text, up to where the assistant's answer begins, as `apply_chat_template` has it.
    variables: special tokens, and what else the template knows, such as `enable_thinking`."""
    template = pick(templates, tools)
    _check_messages(messages, template)
    from common.text.template_sandbox import run_bounded

    messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
    inputs: dict[str, Any] = {"tools": tools, "documents": documents, **variables}
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, **inputs}
    renderer = _renderer(template)
    try:
        return run_bounded(lambda: renderer([messages], **options), messages, inputs)[0][0]
    except UserError:
        raise
    except Exception as error:  # the template is a program from the model's folder: it can fail in any way
        reason = re.sub(r"[\w.]+\.<locals>\.", "", one_line(error))
        raise UserError(f"the model's chat template refuses these messages: {reason}") from error


def pick(templates: Templates | None, tools: object = None) -> str:
    """The template for a chat. As transformers: `tool_use` where there are tools, else `default`."""
    if templates is None:
        raise UserError(f"this model has no chat template: pass {OPTION}, or give the prompt as plain text")
    if isinstance(templates, str):
        return templates
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    names = ", ".join(sorted(templates))
    require(name in templates, f"this model has chat templates by name only: choose with --chat-template from {names}")
    return templates[name]


def choose(templates: Templates | None, chosen: str | None) -> Templates | None:
    """The model's templates, or the one that was chosen: by name, as a file, or as a text with Jinja in it. `UserError`
    where one that may be used does not compile."""
    if chosen is not None:
        named: Mapping[str, str] = {"default": templates} if isinstance(templates, str) else templates or {}
        templates = named.get(chosen) or (chosen if "{%" in chosen or "{{" in chosen else None)
        if templates is None:
            known = ", ".join(sorted(named)) or "none"
            where = f"chat_template {chosen!r:.80} is neither a template of this model ({known}) nor a file"
            with refusing(f"chat_template {chosen!r:.80}"):
                templates = _read(Path(os.path.expanduser(chosen)), where)
    for template in [templates] if isinstance(templates, str) else (templates or {}).values():
        _check(template)
    return templates


def template_kwargs(value: object) -> dict[str, Any]:
    """Variables for the templates, as a mapping or as JSON; `UserError` for anything else."""
    example = 'such as {"enable_thinking": false}'
    try:
        parsed: Any = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"chat_template_kwargs is no JSON ({one_line(error)}): give an object {example}") from None
    require(isinstance(parsed, Mapping), f"chat_template_kwargs must be a JSON object, {example}, not {value!r:.80}")
    for name in parsed:
        require(isinstance(name, str) and name not in RESERVED, f"chat_template_kwargs must not hold {name!r:.80}")
    return dict(parsed)


def _check_messages(messages: Sequence[Mapping[str, Any]], template: str) -> None:
    require(bool(messages), "a chat needs at least one message, such as {'role': 'user', 'content': 'Hello'}")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        known = isinstance(role, str) and (role in ROLES or (role in template and bool(re.fullmatch(r"[\w -]+", role))))
        require(known, f"unknown role {role!r:.80} in messages[{index}].role. Choose from: {', '.join(ROLES)}")
        parts: list[Any] = content if isinstance(content, list) else []
        told = content is not None or len(message.keys() - {"role", "content"}) > 0  # such as tool_calls
        told = told and isinstance(content, str | list | None) and all(isinstance(part, Mapping) for part in parts)
        example = "text, or a list of parts such as {'type': 'text', 'text': 'Hello'}"
        require(told, f"messages[{index}].content must be {example}, not {type(content).__name__}")


def _renderer(template: str) -> Callable[..., Any]:
    """transformers' function, which has compiled the template already: that takes no time of a chat's."""
    function: Any = _transformers()
    function.__globals__["_compile_jinja_template"](template)
    return function


@functools.lru_cache(maxsize=1)
def _transformers() -> Callable[..., Any]:
    """transformers' `render_jinja_template`, which compiles with limits. Its own compiling would compute constants."""
    try:
        from transformers.utils import chat_template_utils as theirs

        function: Any = theirs.render_jinja_template
        theirs_compile = theirs._compile_jinja_template  # pyright: ignore
        if "_compile_jinja_template" not in function.__code__.co_names:
            raise AttributeError("render_jinja_template compiles otherwise")
    except (ImportError, AttributeError) as error:
        raise UserError(f"chats need another version of transformers (5.17 to 5.23 work): {one_line(error)}") from error

    @functools.lru_cache(maxsize=8)
    def compile_bounded(source: str) -> Any:
        return _compile(source, theirs_compile("").environment)

    names = {**function.__globals__, "_compile_jinja_template": compile_bounded}
    return types.FunctionType(function.__code__, names, argdefs=function.__defaults__)


def _compile(source: str, environment: Any) -> Any:
    from common.text.template_sandbox import MAX_SOURCE, bounded, run_bounded

    try:
        require(len(source) <= MAX_SOURCE, f"it has {len(source)} characters, and {MAX_SOURCE} is the most")
        return run_bounded(lambda: bounded(environment).from_string(source), [], source)
    except Exception as error:  # of syntax, or too deep a nesting for the parser or for Python
        hint = f"pass another one with {OPTION}"
        raise UserError(f"the chat template does not compile: {one_line(error)[:200]}; {hint}") from error


@functools.lru_cache(maxsize=64)
def _check(template: str) -> None:
    """`UserError` if it does not compile. transformers knows all that jinja2 does, so it is asked only for the rest."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        _compile(template, ImmutableSandboxedEnvironment(extensions=[loopcontrols]))
    except UserError as error:
        if not isinstance(error.__cause__, TemplateSyntaxError):
            raise
        _renderer(template)


# -- where they are ----------------------------------------------------------------------------------------------------


def read_template(folder: Path, options: Mapping[str, Any]) -> Templates | None:
    """Of a folder, as transformers: chat_template.jinja and additional_chat_templates/NAME.jinja, else those in
    tokenizer_config.json, else a processor's chat_template.json."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja", **files}
    if files:
        named = {name: _read(path) for name, path in files.items()}
        return named["default"] if [*named] == ["default"] else named
    path, template = folder / "tokenizer_config.json", options.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        path = folder / "chat_template.json"
        with refusing(str(path)):
            template = json.loads(_read(path))["chat_template"]
    return _checked(template, str(path))


def gguf_templates(metadata: Mapping[str, Any]) -> Templates | None:
    """Of a GGUF file: `tokenizer.chat_template`, and others under `tokenizer.chat_template.NAME`."""
    key = "tokenizer.chat_template"
    named = {k.removeprefix(f"{key}."): value for k, value in metadata.items() if k.startswith(f"{key}.")}
    if named and metadata.get(key) is not None:
        named = {"default": metadata[key], **named}
    return _checked(named or metadata.get(key), key)


def _checked(template: Any, where: str) -> Templates | None:
    """A text, a mapping of names to texts, or a list of {name, template}; null is none."""
    if isinstance(template, list):
        with refusing(f"{where}: its list of chat templates"):
            template = {entry["name"]: entry["template"] for entry in template}  # pyright: ignore
    if template is None:
        return None
    texts: list[Any] = [*template, *template.values()] if isinstance(template, Mapping) else [template]
    kinds = ", ".join({type(text).__name__ for text in texts if not isinstance(text, str)})
    require(not kinds, f"{where}: a chat_template must be text, not {kinds}")
    return template


def _read(path: Path, missing: str | None = None) -> str:
    with refusing(str(path)[:200]):
        require(missing is None or path.is_file(), missing or "")
        require(path.stat().st_size < 1 << 20, f"{path} has more than a megabyte: it is no chat template")
        return path.read_text(encoding="utf-8")
