"""Answers that have to call a tool: the grammar that `tool_choice` asks for, and that of a call beside a
`response_format`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.sampling.grammar import WHITESPACE
from common.sampling.json_schema import closed
from common.serving.errors import ApiError
from common.serving.schema import Tool
from common.serving.tools.parser import ToolParser

NAMED = "{'type': 'function', 'function': {'name': '...'}}"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def must_call(choice: str | dict[str, Any] | None, tools: Sequence[Tool] | None) -> dict[int, Tool]:
    """The tools of which the answer has to call one, by their places; none if it may do without. Raises `ApiError`."""
    if choice in (None, "none", "auto"):
        return {}
    if not tools:
        raise ApiError(400, "'tool_choice' needs 'tools'.", param="tool_choice")
    if choice == "required":
        return dict(enumerate(tools))
    function: Any = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or choice.keys() != {"type", "function"} or choice["type"] != "function":
        message = f"'tool_choice' is 'none', 'auto', 'required' or {NAMED}; this server takes no other."
        raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
    where = "tool_choice.function"
    if not isinstance(function, dict) or function.keys() != {"name"} or not isinstance(function["name"], str):
        raise ApiError(400, f"'{where}' takes a 'name', and nothing else.", param=where)
    named = {place: tool for place, tool in enumerate(tools) if tool.function.name == function["name"]}
    if not named:
        given = ", ".join(dict.fromkeys(tool.function.name for tool in tools))
        text = f"'{where}.name' is none of 'tools', which are {given}."
        raise ApiError(400, text, param=f"{where}.name", code="invalid_value")
    return named


def grammar(kind: type[ToolParser], tools: Mapping[int, Tool], parallel: bool, otherwise: Any = None) -> str:
    """Calls of these tools as the family writes them, one or (`parallel`) more; or JSON of the schema `otherwise`.

    Each schema is a document of its own, so that its references find what they name."""
    calls = f"call ({_text(kind.between)} call)*" if parallel else "call"
    try:
        schemas = {number: closed(_arguments(tool, number)) for number, tool in tools.items()}
        otherwise = None if otherwise is None else closed(otherwise)
    except ValueError as error:
        raise ApiError(400, f"A schema of 'tools' or 'response_format': {error}.", param="tools") from None
    rules = [f"start: {calls}" + (" | answer" if otherwise is not None else "")]
    rules.append("call: " + " | ".join(f"call{number}" for number in tools))
    for number, tool in tools.items():
        head = f'{kind.before}{{"name": {json.dumps(tool.function.name, ensure_ascii=False)}, "{kind.key}": '
        rules.append(f"call{number}: {_text(head)} arguments{number} {_text('}' + kind.after)}")
        rules.append(f"arguments{number}: {_json(schemas[number])}")
    return "\n".join(rules + ([f"answer: {_json(otherwise)}"] if otherwise is not None else []))


def _arguments(tool: Tool, number: int) -> dict[str, Any]:
    schema = NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters
    if schema.get("type", "object") != "object":
        where = f"tools[{number}].function.parameters"
        raise ApiError(400, f"'{where}' must be a schema of type 'object'.", param=where, code="invalid_value")
    return {**schema, "type": "object"}


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Any) -> str:
    guidance = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps({**schema, **guidance} if isinstance(schema, dict) else schema)}"
