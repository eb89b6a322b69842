"""openai-python."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def test_chat(any_url: str, model: str) -> None:
    client = openai.OpenAI(base_url=any_url, api_key="none", max_retries=0, timeout=120)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0)
    assert "Paris" in answer.choices[0].message.content


def test_stream(client: openai.OpenAI, model: str) -> None:
    pieces = list(
        client.chat.completions.create(
            model=model, messages=ASK, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert pieces[-1].usage.completion_tokens == sum(bool(p.choices and p.choices[0].delta.content) for p in pieces)


def test_completions_of_two_prompts(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["One, two,", "A, B,"], n=2, max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices)


def test_asynchronous(url: str, model: str) -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model=model, messages=ASK, max_tokens=4) for _ in range(8)))

    answers = asyncio.run(all_of_them())
    assert [answer.usage.completion_tokens for answer in answers] == [4] * 8


def test_parse(any_url: str, model: str, weather: type[BaseModel]) -> None:
    client = openai.OpenAI(base_url=any_url, api_key="none", max_retries=0, timeout=120)
    answer = client.chat.completions.parse(model=model, messages=ASK, response_format=weather, max_tokens=300)
    assert isinstance(answer.choices[0].message.parsed, weather)


def test_streamed_parse(client: openai.OpenAI, model: str, weather: type[BaseModel]) -> None:
    with client.chat.completions.stream(model=model, messages=ASK, response_format=weather, max_tokens=300) as stream:
        kinds = {event.type for event in stream}
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, weather)


def test_json_object(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASK, response_format={"type": "json_object"}, max_tokens=400, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("named", [False, True], ids=["required", "named"])
def test_tool_choice(any_url: str, model: str, weather: type[BaseModel], named: bool) -> None:
    client = openai.OpenAI(base_url=any_url, api_key="none", max_retries=0, timeout=120)
    tool = openai.pydantic_function_tool(weather)
    answer = client.chat.completions.parse(
        model=model,
        messages=ASK,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "Weather"}} if named else "required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, weather)
    asked = [*ASK, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(model=model, messages=asked, tools=[tool], tool_choice="none", max_tokens=8)
    assert after.choices[0].message.content


def test_streamed_tool_call(client: openai.OpenAI, model: str, weather: type[BaseModel]) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=ASK,
        tools=[openai.pydantic_function_tool(weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    ) as stream:
        kinds = {event.type for event in stream}
    assert "tool_calls.function.arguments.done" in kinds
    [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, weather)


def test_what_is_not_offered_is_404(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/responses"):
        client.responses.create(model=model, input="hello")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model=model, input="hello")
