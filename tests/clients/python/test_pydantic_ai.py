"""pydantic-ai."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

ASK = "What is the weather in Paris?"


class Anything(BaseModel):
    city: Any = None


class FirstAsk(AbstractCapability[None]):
    """The first step has to call `weather_of`; the next ones answer."""

    def get_model_settings(self) -> Any:
        return lambda context: ModelSettings(tool_choice=["weather_of"] if context.run_step <= 1 else "none")


def agent_of(url: str, model: str, **options: Any) -> Agent[None, Any]:
    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    settings = ModelSettings(max_tokens=300, parallel_tool_calls=False, timeout=120)
    return Agent(chat, **{"model_settings": settings, "retries": 0} | options)


def test_text(url: str, model: str) -> None:
    result = agent_of(url, model).run_sync(ASK, model_settings=ModelSettings(max_tokens=8))
    assert result.output and result.usage.output_tokens == 8


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_output_types(any_url: str, model: str, weather: type[BaseModel], kind: Any) -> None:
    assert isinstance(agent_of(any_url, model, output_type=kind(weather)).run_sync(ASK).output, weather)


def test_one_of_two_output_types(url: str, model: str, weather: type[BaseModel]) -> None:
    assert isinstance(agent_of(url, model, output_type=[weather, Anything]).run_sync(ASK).output, BaseModel)


def test_prompted_output(url: str, model: str) -> None:
    """In this mode the form is the model's affair, which is too small for it: any object fits this one."""
    settings = ModelSettings(max_tokens=300, timeout=120)
    agent = agent_of(url, model, output_type=PromptedOutput(Anything), retries=5, model_settings=settings)
    assert isinstance(agent.run_sync(ASK).output, Anything)


def test_a_tool_that_is_run(url: str, model: str) -> None:
    agent, seen = agent_of(url, model, capabilities=[FirstAsk()]), list[str]()

    @agent.tool
    def weather_of(context: RunContext[None], city: str) -> str:
        """The weather of a city."""
        seen.append(city)
        return "rain"

    result = agent.run_sync(ASK)
    assert len(seen) == 1 and isinstance(result.output, str)


def test_streamed_output(url: str, model: str, weather: type[BaseModel]) -> None:
    agent = agent_of(url, model, output_type=NativeOutput(weather))
    result = agent.run_stream_sync(ASK)
    assert len(list(result.stream_output(debounce_by=None))) > 1
    assert isinstance(result.get_output(), weather)
