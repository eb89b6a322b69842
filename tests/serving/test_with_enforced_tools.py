"""Calls that have to come: a random model makes them well-formed, in each family's format, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tokenizers import AddedToken

from common.sampling.structure import Structures
from common.text.tokenizer import Tokenizer
from tests.engine_checks import set_eos
from tests.serving.running import SOME, TINY, Running, error_of
from tests.serving.test_with_tools import CLOCK, TEMPLATES, joined
from tests.test_structure import EOS, bytes_tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

Serve = Callable[..., Running]
USER: dict[str, Any] = {"role": "user", "content": "Rain in Köln?"}
WEATHER: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["city", "days"],
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/days"}},
    "$defs": {"days": {"type": "array", "maxItems": 2, "items": {"enum": [1, 2.5, "ü"]}}},
}  # fmt: skip
ANY_OF = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "additionalProperties": False,
          "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}}}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    CLOCK,
    {"type": "function", "function": {"name": "either_or", "parameters": ANY_OF}},
]
SCHEMAS = {"weather": WEATHER, "clock": {"type": "object", "maxProperties": 0}, "either_or": ANY_OF}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}


def structured(serve: Serve, kind: str = "hermes", **options: Any) -> Running:
    """A server over a random model that reads and writes bytes, and can be told what to write."""
    running = serve(talks=False, **options)
    set_eos(running.engine, EOS)
    tokenizer = running.engine.tokenizer = bytes_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind]
    running.engine._admission.structures = Structures(tokenizer, 512, [EOS])
    return running


def ask(running: Running, **options: Any) -> Any:
    given = {"model": TINY, "messages": [USER], "tools": TOOLS, "max_tokens": 400, "seed": 1, **options}
    return running.client.chat.completions.create(**given)


def assert_calls(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("stage", SOME)
def test_a_random_model_calls_well_formed(serve: Serve, kind: str, stage: str) -> None:
    running, called = structured(serve, kind, stage=stage), set[str]()
    for seed, choice, parallel in [(1, "required", False), (2, NAMED, False), (3, "required", True)]:
        options = {"tool_choice": choice, "parallel_tool_calls": parallel, "n": 3, "seed": seed}
        whole = ask(running, **options).choices
        for answer in whole:
            calls = answer.message.tool_calls or []
            assert calls or answer.finish_reason == "length"
            assert answer.finish_reason == "length" or answer.message.content is None
            assert parallel or answer.finish_reason == ("stop" if choice is NAMED else "tool_calls")
            assert parallel or len(calls) == 1
            assert_calls([(call.function.name, call.function.arguments) for call in calls])
            called |= {call.function.name for call in calls}
        streamed = joined(ask(running, **options, stream=True))
        for answer in whole:
            state = streamed[answer.index]
            found = [(name, "".join(parts)) for name, parts in state["calls"]]
            expected = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
            assert found[: len(expected)] == expected and state["finish"] == answer.finish_reason
    assert len(called) > 1
    running.wait_until_idle()


def test_the_clients_own_helpers_get_calls(serve: Serve) -> None:
    class weather(BaseModel):
        """How it will be."""

        city: str = Field(max_length=4)
        hot: bool

    running = structured(serve)
    tool = openai.pydantic_function_tool(weather)
    for choice in ("required", NAMED):
        with running.client.chat.completions.stream(
            model=TINY, messages=[USER], tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=300
        ) as stream:
            final = stream.get_final_completion().choices[0].message
        assert final.tool_calls is not None
        assert isinstance(final.tool_calls[0].function.parsed_arguments, weather)


def test_a_call_or_the_json_that_was_asked_for(serve: Serve) -> None:
    running, kinds = structured(serve), set[bool]()
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(6):
        for answer in ask(running, response_format=form, seed=seed, n=4, parallel_tool_calls=False).choices:
            assert answer.finish_reason == ("tool_calls" if answer.message.tool_calls else "stop")
            kinds.add(bool(answer.message.tool_calls))
            if answer.message.tool_calls:
                assert_calls([(c.function.name, c.function.arguments) for c in answer.message.tool_calls])
            else:
                jsonschema.validate(json.loads(answer.message.content), schema)
    assert kinds == {True, False}
    [forced] = ask(running, response_format=form, tool_choice=NAMED, parallel_tool_calls=False).choices
    assert forced.message.tool_calls[0].function.name == "weather"
    [plain] = ask(running, response_format=form, tool_choice="none").choices
    jsonschema.validate(json.loads(plain.message.content), schema)


ODD = 'a "b" \\ /é🙂 </tool_call> ::= %json'


def test_names_that_need_quotes(serve: Serve) -> None:
    tools = [{"type": "function", "function": {"name": ODD, "parameters": {"type": "object", "maxProperties": 0}}}]
    for kind in TEMPLATES:
        [answer] = ask(structured(serve, kind), tools=tools, tool_choice="required", parallel_tool_calls=False).choices
        assert answer.message.tool_calls[0].function.name == ODD


def tool(**parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice.function.name",
            "weather, clo",
        ),
        ({"tool_choice": {"type": "function", "name": "clock"}}, "tool_choice", "takes no other"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function", "a 'name'"),
        ({"tool_choice": {"type": "function", "function": "clock"}}, "tool_choice.function", "a 'name'"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "clock"}}}, "tool_choice", "takes no other"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
            "no",
        ),
        ({"tool_choice": {}}, "tool_choice", "takes no other"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs 'tools'"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "needs 'tools'"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "no room for a call"),
        ({"tool_choice": "required", **tool(type="array")}, "tools[0].function.parameters", "type 'object'"),
        ({"tool_choice": "required", **tool(properties={"a": {"type": "banana"}})}, "tools", "banana"),
        ({"tool_choice": "required", **tool(properties={"a": False}, required=["a"])}, "tools", "nsatisfiable"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
    ],
)
def test_choices_that_cannot_be_followed(serve: Serve, change: dict[str, Any], param: str, says: str) -> None:
    body = {"model": TINY, "messages": [USER], "tools": TOOLS, "max_tokens": 4} | change
    error = error_of(structured(serve).post("/v1/chat/completions", body), 400)
    assert error["param"] == param and says in error["message"]


def test_a_format_of_calls_that_is_not_known(serve: Serve) -> None:
    running = structured(serve)
    assert running.engine.tokenizer is not None
    running.engine.tokenizer.chat_template = "{{ tools }}[TOOL_CALLS]"
    body = {"model": TINY, "messages": [USER], "tools": TOOLS, "tool_choice": "required"}
    assert "--tool-parser" in error_of(running.post("/v1/chat/completions", body), 400)["message"]


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_tokens_of_the_vocabulary(serve: Serve, special: bool) -> None:
    """As in Qwen's: the call is written in other tokens, since these are no text."""
    running = structured(serve)
    backend = bytes_tokenizer().backend
    backend.add_tokens([AddedToken(tag, special=special) for tag in ("<tool_call>", "</tool_call>")])
    tokenizer = running.engine.tokenizer = Tokenizer(backend, [EOS])
    tokenizer.chat_template = TEMPLATES["hermes"]
    running.engine._admission.structures = Structures(tokenizer, 512, [EOS])
    for choice in ("required", NAMED):
        answer = ask(running, tool_choice=choice, parallel_tool_calls=False)
        [call] = answer.choices[0].message.tool_calls
        assert_calls([(call.function.name, call.function.arguments)])
        assert answer.choices[0].message.content is None


def test_a_call_that_is_cut_in_its_last_tag_is_a_call_and_no_text(serve: Serve) -> None:
    running = structured(serve)
    whole = ask(running, tool_choice=NAMED)
    count = whole.usage.completion_tokens
    for cut in range(count - 12, count):
        message = ask(running, tool_choice=NAMED, max_tokens=cut).choices[0].message
        text = message.content or ""
        assert "tool_c" not in text or "<tool_call>" in text, text
        if cut > count - 10:
            assert message.tool_calls and not text
