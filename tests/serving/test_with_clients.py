"""What clients other than openai's send, as they send it; `make clients` runs the clients themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from common.serving.schema import Tool
from common.serving.tools import PARSERS
from common.serving.tools.enforced import grammar
from tests.serving.running import TINY, Running
from tests.serving.test_with_enforced_tools import NAMED, TOOLS, USER, ask, assert_calls, structured

Serve = Callable[..., Running]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": PARAMETERS}}
FORM = {"name": "Weather", "schema": PARAMETERS | {"additionalProperties": False}, "strict": True}
MANY: dict[str, dict[str, Any]] = {
    "guidellm": {
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True,
        "max_completion_tokens": 8, "max_tokens": 8, "stop": None,
    },
    "litellm": {"temperature": None, "extra_body": {"top_k": 5, "min_p": 0.1}, "tools": [TOOL], "tool_choice": "none"},
    "langchain": {
        "tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}], "tool_choice": NAMED,  # type: ignore[dict-item]
        "parallel_tool_calls": False, "stream": False, "n": 1, "temperature": 0.7,
    },
    "instructor": {"response_format": {"type": "json_schema", "json_schema": FORM}, "seed": 1},
    "ai": {
        "tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "pydantic-ai": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "store": False},
}  # fmt: skip


@pytest.mark.parametrize("client", MANY)
def test_their_requests_are_answered(serve: Serve, client: str) -> None:
    body = {"model": TINY, "messages": [USER], "max_tokens": 300} | MANY[client]
    more = body.pop("extra_body", {})
    response = structured(serve).post("/v1/chat/completions", body | more)
    assert response.status_code == 200, response.text
    assert "error" not in response.text


def test_what_a_client_parsed_may_be_sent_back(serve: Serve) -> None:
    class weather(BaseModel):
        city: str = Field(max_length=4)

    running = structured(serve)
    parse = running.client.chat.completions.parse
    given: dict[str, Any] = {"model": TINY, "max_tokens": 200, "seed": 1}
    tool = openai.pydantic_function_tool(weather)
    called = parse(messages=[USER], tools=[tool], tool_choice=NAMED, **given).choices[0].message
    assert called.tool_calls and isinstance(called.tool_calls[0].function.parsed_arguments, weather)
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain"}
    answer = parse(messages=[USER, called, result], response_format=weather, **given).choices[0].message
    assert isinstance(answer.parsed, weather)
    for last in (answer, answer.model_dump(), {**answer.model_dump(), "provider_specific_fields": None}):
        history = [USER, called, result, last, USER]
        assert running.client.chat.completions.create(**given | {"messages": history, "max_tokens": 4}).choices


def test_a_named_tool_is_called_once(serve: Serve) -> None:
    """Clients such as instructor take no second call of it, and do not say so."""
    running = structured(serve)
    for seed in range(4):
        for answer in ask(running, tools=TOOLS, tool_choice=NAMED, seed=seed, n=4).choices:
            [call] = answer.message.tool_calls
            assert_calls([(call.function.name, call.function.arguments)])


def test_what_is_not_offered_is_404(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/responses"):
        running.client.responses.create(model=TINY, input="hello")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        running.client.embeddings.create(model=TINY, input="hello")


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"], "title": "x", "$defs": {}}, True),
        ({"properties": {}}, True),
        ({}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "required": [["b"]]}, False),
        ({"properties": {"a": {}}, "required": 5}, False),
        ({"properties": ["a"]}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["b"]}]}, False),
    ],
)
def test_arguments_are_the_ones_that_are_listed(schema: dict[str, Any], closed: bool) -> None:
    """langchain's tools, for one, list them and do not forbid others."""
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": schema}})
    assert ('"additionalProperties": false' in grammar(PARSERS["hermes"], {0: tool}, False)) == closed
