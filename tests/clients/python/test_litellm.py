"""litellm."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def given(url: str, model: str) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": url, "api_key": "none", "num_retries": 0, "max_tokens": 300}


def test_completion_and_stream(given: dict[str, Any]) -> None:
    short = given | {"max_tokens": 8}
    assert litellm.completion(messages=ASK, **short).choices[0].message.content
    pieces = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **short))
    assert litellm.stream_chunk_builder(pieces).usage.completion_tokens <= 8
    assert asyncio.run(litellm.acompletion(messages=ASK, **short)).choices[0].message.content


def test_hosted_vllm(given: dict[str, Any], model: str) -> None:
    """litellm's other name for such a server, with fields of vLLM."""
    other = given | {"model": f"hosted_vllm/{model}", "max_tokens": 8}
    assert litellm.completion(messages=ASK, top_k=5, min_p=0.1, **other).choices[0].message.content


def test_text_completion(given: dict[str, Any], model: str) -> None:
    other = given | {"model": f"text-completion-openai/{model}", "max_tokens": 8}
    assert litellm.text_completion(prompt="One, two,", **other).choices[0].text


def test_response_format(given: dict[str, Any], weather: type[BaseModel]) -> None:
    answer = litellm.completion(messages=ASK, response_format=weather, **given)
    weather.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools(given: dict[str, Any], weather: type[BaseModel], stream: bool) -> None:
    function = {"name": "weather", "description": "The weather.", "parameters": weather.model_json_schema()}
    answer = litellm.completion(
        messages=ASK,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        stream=stream,
        **given,
    )
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    [call] = answer.choices[0].message.tool_calls
    weather.model_validate_json(call.function.arguments)
    history = [*ASK, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert litellm.completion(messages=history, **given | {"max_tokens": 8}).choices[0].message.content
    history[1] = answer.choices[0].message.model_dump()
    assert litellm.completion(messages=history, **given | {"max_tokens": 8}).choices[0].message.content
