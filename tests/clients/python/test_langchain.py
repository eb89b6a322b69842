"""langchain-openai."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

ASK = "What is the weather in Paris?"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@pytest.fixture
def chat(url: str, model: str) -> ChatOpenAI:
    return chat_of(url, model)


def chat_of(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=300, max_retries=0, timeout=120)


def test_invoke_with_history(chat: ChatOpenAI) -> None:
    history = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Hello!"), HumanMessage("How are you?")]
    answer = chat.invoke(history, max_tokens=8)
    assert answer.content and answer.usage_metadata["output_tokens"] <= 8


def test_stream_and_batch(chat: ChatOpenAI) -> None:
    pieces = list(chat.stream(ASK, max_tokens=8, stream_usage=True))
    assert len(pieces) > 2 and sum(pieces[1:], pieces[0]).usage_metadata["output_tokens"] <= 8
    assert all(answer.content for answer in chat.batch([ASK] * 4, max_tokens=4))


@pytest.mark.parametrize("choice", ["any", "required", True, "add"])
def test_bind_tools(chat: ChatOpenAI, choice: Any) -> None:
    tools = [add] if choice is True else [add, multiply]
    answer = chat.bind_tools(tools, tool_choice=choice, parallel_tool_calls=False).invoke("What is 2 and 3?")
    [call] = answer.tool_calls
    assert call["name"] in ([one.name for one in tools] if choice in ("any", "required", True) else [choice])
    result = {"add": add, "multiply": multiply}[call["name"]].invoke(call)
    assert isinstance(result, ToolMessage)
    assert chat.bind_tools(tools).invoke([HumanMessage("What is 2 and 3?"), answer, result], max_tokens=8)


def test_streamed_tool_call(chat: ChatOpenAI) -> None:
    pieces = list(chat.bind_tools([add], tool_choice="add", parallel_tool_calls=False).stream("What is 2 and 3?"))
    [call] = sum(pieces[1:], pieces[0]).tool_calls
    assert set(call["args"]) == {"a", "b"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(any_url: str, model: str, weather: type[BaseModel], method: Any) -> None:
    asked = chat_of(any_url, model).with_structured_output(weather, method=method)
    assert isinstance(asked.invoke(ASK), weather)


def test_with_structured_output_as_any_json(chat: ChatOpenAI, weather: type[BaseModel]) -> None:
    """In this mode the form is the model's affair, which is too small for it: it is enough that it is JSON."""
    asked = chat.with_structured_output(weather, method="json_mode", include_raw=True)
    try:
        text = asked.invoke('Answer with the JSON {"city": "Paris", "degrees": 20, "sky": "clear"}')["raw"].content
    except openai.LengthFinishReasonError as cut:
        text = cut.completion.choices[0].message.content
    assert text.lstrip().startswith("{")


def test_strict_tools(chat: ChatOpenAI, weather: type[BaseModel]) -> None:
    asked = chat.with_structured_output(weather, method="function_calling", strict=True)
    assert isinstance(asked.invoke(ASK), weather)
    assert isinstance(list(chat.with_structured_output(weather).stream(ASK))[-1], weather)
