"""llama-index, by its client of servers like OpenAI's."""

from __future__ import annotations

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

ASK = [ChatMessage(role="user", content="What is the weather in Paris?")]


@pytest.fixture
def llm(url: str, model: str) -> OpenAILike:
    return OpenAILike(
        api_base=url,
        api_key="none",
        model=model,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=300,
        max_retries=0,
        timeout=120,
        context_window=2048,
    )


def test_chat_and_stream(llm: OpenAILike) -> None:
    assert llm.chat(ASK, max_tokens=8).message.content
    assert len(list(llm.stream_chat(ASK, max_tokens=8))) > 2


def test_complete(llm: OpenAILike) -> None:
    llm.is_chat_model = False
    assert llm.complete("One, two,", max_tokens=8).text
    assert len(list(llm.stream_complete("One, two,", max_tokens=8))) > 2


def test_structured_predict(llm: OpenAILike, weather: type[BaseModel]) -> None:
    prompt = PromptTemplate("What is the weather in {city}?")
    answer = llm.structured_predict(weather, prompt, llm_kwargs={"tool_required": True}, city="Paris")
    assert isinstance(answer, weather)


def test_a_program_of_calls(llm: OpenAILike, weather: type[BaseModel]) -> None:
    program = FunctionCallingProgram.from_defaults(
        output_cls=weather, llm=llm, prompt_template_str="What is the weather in {city}?", tool_required=True
    )
    assert isinstance(program(city="Paris"), weather)


def test_a_tool_that_is_required(llm: OpenAILike) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    answer = llm.predict_and_call([FunctionTool.from_defaults(add)], "What is 2 and 3?", tool_required=True)
    assert answer.sources[0].tool_name == "add"
