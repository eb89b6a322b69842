"""instructor."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def client_of(url: str, mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120), mode=mode)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_answers(any_url: str, model: str, weather: type[BaseModel], mode: instructor.Mode) -> None:
    client = client_of(any_url, mode)
    answer = client.chat.completions.create(
        model=model, messages=ASK, response_model=weather, max_retries=0, max_tokens=300
    )
    assert isinstance(answer, weather)


def test_answers_as_any_json(url: str, model: str) -> None:
    """In this mode the form is the model's affair, which is too small for it: any object fits this one."""

    class Anything(BaseModel):
        city: Any = None

    client = client_of(url, instructor.Mode.JSON)
    answer = client.chat.completions.create(
        model=model, messages=ASK, response_model=Anything, max_retries=5, max_tokens=300
    )
    assert isinstance(answer, Anything)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_partial_answers_of_a_stream(url: str, model: str, weather: type[BaseModel], mode: instructor.Mode) -> None:
    client = client_of(url, mode)
    pieces = list(
        client.chat.completions.create_partial(model=model, messages=ASK, response_model=weather, max_tokens=300)
    )
    assert len(pieces) > 3
    weather.model_validate(pieces[-1].model_dump())


def test_several_objects_of_a_stream(url: str, model: str, weather: type[BaseModel]) -> None:
    client = client_of(url, instructor.Mode.TOOLS)
    objects = client.chat.completions.create_iterable(model=model, messages=ASK, response_model=weather, max_tokens=300)
    assert all(isinstance(one, weather) for one in objects)
