"""From the fields of a request to a prompt and `SamplingParams`, with the limits held."""

import bisect
import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.engine import Engine
from common.errors import UserError
from common.sampling_params import SamplingParams
from common.serving.errors import ApiError
from common.serving.options import ServerOptions
from common.serving.schema import ChatRequest, CompletionRequest, Message, Sampling, Tool, ToolCall
from common.serving.tools import PARSERS, ToolParser, choose, grammar, in_plain_text, must_call
from common.text.prompts import Prompt, encode_prompt
from common.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # of /v1/completions without `max_tokens`, as in OpenAI's; a chat's answer may fill the context
STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")
PASSED_ON = {  # fields that `SamplingParams` has under the same name
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "stop_token_ids", "min_tokens", "ignore_eos",
}  # fmt: skip


class Conversation(list[dict[str, Any]]):
    """Messages, and the tools that the template is given. `size`: characters of all that, as Python prints it."""

    tools: list[dict[str, Any]] | None = None
    size = 0


class BareText(str):
    """Without the special tokens that a model expects around a prompt."""


def conversation(
    messages: Sequence[Message], tools: Sequence[Tool] | None, tokenizer: Tokenizer | None, choice: Any = None
) -> Conversation:
    """As every template takes it: parts are lines of one text; OpenAI's newer `developer` is `system`; the arguments
    of calls are objects. Too slow for the event loop."""
    result = Conversation()
    for index, message in enumerate(messages):
        role, where = "system" if message.role == "developer" else message.role, f"messages[{index}]"
        known = message.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
        if message.tool_calls:
            known["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
        if message.content is not None:
            known["content"] = _content(message.content, f"{where}.content")
        elif not message.tool_calls:
            text = f"Missing required parameter: '{where}.content'."
            raise ApiError(400, text, param=f"{where}.content", code="missing_required_parameter")
        for name, value in known.items():
            _check_unicode(value, f"{where}.{name}")
        result.append({"role": role, **known})
    given = [tool.model_dump(exclude_none=True) for tool in tools or () if choice != "none"]
    _check_unicode(given, "tools")
    if tokenizer is not None and tokenizer.chat_template is not None:
        plain = in_plain_text(tokenizer.chat_template, result, given)
        result, given = (result, given) if plain is result else (Conversation(plain), [])
    result.tools, result.size = given or None, len(str((result, given)))
    return result


def _check_unicode(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = f"'{where}' is not valid Unicode: it has a lone surrogate."
        raise ApiError(400, text, param=where, code="invalid_value") from None


def _content(content: str | list[dict[str, Any]], where: str) -> str:
    for part in [] if isinstance(content, str) else content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            text = f"'{where}' takes only parts of the form {{'type': 'text', 'text': '...'}}."
            raise ApiError(400, text, param=where, code="unsupported_parameter")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    arguments: Any = call.function.arguments or "{}"
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        where += ".function.arguments"
        raise ApiError(400, f"'{where}' is no JSON object.", param=where, code="invalid_value")
    function = {"name": call.function.name, "arguments": arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


def call_format(engine: Engine, body: Sampling, options: ServerOptions) -> type[ToolParser] | None:
    """None where no call is expected, or in no format that is known."""
    if not isinstance(body, ChatRequest) or not body.tools or body.tool_choice == "none" or engine.tokenizer is None:
        return None
    kind = options.tool_parser or choose(engine.tokenizer.chat_template, body.tools)
    return None if kind is None else PARSERS[kind]


def tool_parser(engine: Engine, body: ChatRequest, options: ServerOptions) -> Callable[[], ToolParser] | None:
    """Makes one for each answer."""
    kind, names = call_format(engine, body, options), [tool.function.name for tool in body.tools or ()]
    parallel, eager = body.parallel_tool_calls is not False, bool(body.stream)
    return None if kind is None else lambda: kind(names, parallel, eager, isinstance(body.tool_choice, dict))


def completion_prompts(body: CompletionRequest) -> list[Prompt]:
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def longest_text(engine: Engine, options: ServerOptions) -> int | None:
    """Most characters of a prompt that fits: as if each token were the longest of the vocabulary."""
    if engine.tokenizer is None:
        return None
    tokens = min(options.max_prompt_tokens or engine.max_model_len, engine.max_model_len)
    return tokens * max(map(len, engine.tokenizer.backend.get_vocab(with_added_tokens=True)))


def text_length(prompt: Prompt) -> int:
    """Characters of a text or of the messages of a chat; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.get("content", "")) for message in prompt if isinstance(message, Mapping))


def encode(engine: Engine, prompt: Prompt, options: ServerOptions, template_kwargs: dict[str, Any] | None) -> list[int]:
    """Token ids of a prompt. Only reads, so it may run next to the engine's thread; too slow for the event loop."""
    vocab_size, tools = engine.runner.model.config.vocab_size, getattr(prompt, "tools", None)
    param = "messages" if isinstance(prompt, Conversation) else "prompt"
    _check_unicode(template_kwargs, "chat_template_kwargs")
    try:
        if isinstance(prompt, BareText) and engine.tokenizer is not None:
            token_ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
        else:
            token_ids = encode_prompt(prompt, engine.tokenizer, vocab_size, template_kwargs, tools)
    except UserError as error:
        param = "chat_template_kwargs" if str(error).startswith("chat_template_kwargs") else param
        raise ApiError(400, str(error), param=param) from None
    longest = options.max_prompt_tokens
    if longest is not None and len(token_ids) > longest:
        raise ApiError(
            400, f"The prompt has {len(token_ids)} tokens; this server takes {longest} at most.", param=param
        )
    return token_ids


def sampling_params(
    engine: Engine, body: Sampling, num_prompt_tokens: int, options: ServerOptions, structure: Mapping[str, Any]
) -> SamplingParams:
    """Raises `UserError` or `ApiError` for what is not possible."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is only allowed with 'stream': true.", param="stream_options")
    if body.priority and engine.config.scheduling_policy != "priority":
        raise ApiError(400, "'priority' needs a server with --scheduling-policy priority.", param="priority")
    given: dict[str, Any] = {"temperature": 1.0} | body.model_dump(include=PASSED_ON, exclude_none=True)
    return SamplingParams(
        **given,
        **structure,
        seed=None if body.seed in (None, -1) else body.seed % 2**63,
        logprobs=_logprobs(body),
        prompt_logprobs=_logprobs(body) or 0 if _wants_prompt(body) else None,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        max_tokens=_max_tokens(engine, body, num_prompt_tokens, options),
    )


def structure(engine: Engine, body: Sampling, options: ServerOptions) -> tuple[str | None, dict[str, Any]]:
    """The field that asks for structured output, and `SamplingParams`' name and value of it.

    Where a call may take the place of JSON that was asked for, or has to come, both are in one grammar."""
    param, given = _asked(body)
    if not isinstance(body, ChatRequest):
        return param, given
    forced, named = must_call(body.tool_choice, body.tools), isinstance(body.tool_choice, dict)
    parallel = body.parallel_tool_calls is not False and not named  # a named one is called once, as clients expect
    kind, schema = call_format(engine, body, options), given.get("schema")
    if "json_object" in given:
        schema = {"type": "object"}
    if given and schema is None and forced:
        raise ApiError(400, f"'{param}' leaves no room for a call: give JSON, or no 'tool_choice'.", param=param)
    if forced and kind is None:
        text = "how this model writes calls is not known here: start the server with --tool-parser"
        raise ApiError(400, f"'tool_choice' cannot be followed: {text}.", param="tool_choice")
    if kind is None or (not forced and schema is None):
        return param, given
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"'{param}' is no JSON: {error}", param=param) from None
    tools = forced or dict(enumerate(body.tools or ()))
    return "tools" if forced else param, {"grammar": grammar(kind, tools, parallel, None if forced else schema)}


def _asked(body: Sampling) -> tuple[str | None, dict[str, Any]]:
    asked = [
        (f"guided_{kind}", kind, getattr(body, f"guided_{kind}")) for kind in ("json", "regex", "choice", "grammar")
    ]
    asked += [("structured_outputs", kind, value) for kind, value in (body.structured_outputs or {}).items()]
    form = body.response_format
    if form is not None and form.type == "json_object":
        asked.append(("response_format", "json_object", True))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "'response_format' of type 'json_schema' needs 'json_schema'.", param="response_format")
        asked.append(("response_format", "json", form.json_schema.schema_))
    asked = [one for one in asked if one[2] is not None and one[2] is not False]
    if len(asked) > 1:
        raise ApiError(400, f"Give one of {' and '.join(kind for _, kind, _ in asked)}.", param=asked[-1][0])
    for param, kind, value in asked:
        if kind not in STRUCTURES:
            raise ApiError(400, f"'{kind}' is not supported by this server.", param=param, code="unsupported_parameter")
        if kind == "choice":
            texts = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
            if not texts:
                raise ApiError(400, "A choice is a list of texts.", param=param)
            return param, {"regex": "|".join(map(re.escape, value))}
        return param, {"schema" if kind == "json" else kind: value}
    return None, {}


def compiled(engine: Engine, param: str, given: Mapping[str, Any], known: bool = False) -> object | None:
    """What it asks for, which may take a moment, on any thread. `known`: only if it is there already, else None."""
    try:
        return engine.compile_structure(SamplingParams(**given), known)
    except UserError as error:
        raise ApiError(400, str(error), param=param) from None


def _logprobs(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None


def _wants_prompt(body: Sampling) -> bool:
    """With its log-probabilities, or with nothing behind it."""
    if not isinstance(body, CompletionRequest) or not body.echo:
        return False
    return body.logprobs is not None or body.max_tokens == 0


def _max_tokens(engine: Engine, body: Sampling, num_prompt_tokens: int, options: ServerOptions) -> int:
    """What was asked for, if it fits; without it, what fits."""
    name = "max_tokens"
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if asked == 0 and not _wants_prompt(body):
        raise ApiError(400, f"{name} must be greater than or equal to 1, or 0 with 'echo': true.", param=name)
    if asked is not None and options.max_tokens is not None and asked > options.max_tokens:
        message = f"{name} is too large: {asked}. This server gives at most {options.max_tokens}."
        raise ApiError(400, message, param=name)
    longest, wanted = _longest(engine, body.n or 1), asked or 1
    room = longest - num_prompt_tokens
    if room < wanted:
        sizes = f"{num_prompt_tokens + wanted} ({num_prompt_tokens} in the prompt, {wanted} in the answer)"
        message = f"This model's maximum context length is {longest} tokens. However, you requested {sizes}."
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    usual = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else room
    return min(room, options.max_tokens or room, usual) if asked is None else asked


def _longest(engine: Engine, n: int) -> int:
    """Most tokens that a request can have, prompt and output: `max_model_len`, or less where the KV cache is small."""
    fits = engine.scheduler.cache.fits
    lengths = range(1, engine.max_model_len + 1)
    return bisect.bisect_left(lengths, True, key=lambda length: not fits(length, n))
