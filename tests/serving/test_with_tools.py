"""Calls of tools, with the real `openai` client: the model's answers are prepared, token by token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from common.config import DEFAULT_MODEL
from common.serving.tools import PARSERS, choose
from common.text.chat_template import Templates
from tests.serving.running import TINY, Running, error_of
from tests.test_cli import byte_tokenizer

Serve = Callable[..., Running]
USER: dict[str, Any] = {"role": "user", "content": "Rain in Köln?"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "strict": True}}
TOOLS = [WEATHER, CLOCK]
NAMES = ["weather", "clock"]
KÖLN, NOW = '{"city": "Köln", "days": [1, 2.0]}', "{}"
ANSWERS = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {KÖLN}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "clock", "arguments": {NOW}}}\n</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {KÖLN}}}; {{"name": "clock", "parameters": {NOW}}}',
}
TEMPLATES = {
    "hermes": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments.city }}{% endfor %};{% endfor %}{% for t in tools or [] %}{{ t.function.name }} "
    "{% endfor %}a:",
    "llama3_json": "{{ messages[0].content }}{% if tools %}{{ tools | length }}{% endif %}{% if false %}"
    '<|start_header_id|>{"name": "parameters"}{% endif %}',
}
END = "\0"


class Prepared:
    """A server whose model says what is given to `say`, and ends its turn there."""

    def __init__(self, serve: Serve, template: str | None = TEMPLATES["hermes"], **options: Any) -> None:
        self.running = serve(**options)
        self.client = self.running.client
        self.tokenizer = self.running.engine.tokenizer = byte_tokenizer()
        if template is not None:
            self.tokenizer.chat_template = template
        [end] = self.tokenizer.encode(END)
        self.tokenizer.__dict__["turn_end_token_ids"] = frozenset([end])
        self.prompts: list[str] = []
        self._answer: list[int] = []
        self._said = Counter[str]()
        runner, submit = self.running.engine.runner, self.running.service.thread.submit
        collect = runner.collect

        def prepared() -> dict[str, Any]:
            tokens = collect()
            for request_id, token in tokens.items():
                prepared_id = self._answer[min(self._said[request_id], len(self._answer) - 1)]
                self._said[request_id] += 1
                tokens[request_id] = token._replace(
                    token_id=prepared_id, logprobs=token.logprobs and {prepared_id: -0.5}
                )
            return tokens

        def noted(job: Any) -> None:
            self.prompts.append(self.tokenizer.decode(job.prompt))
            submit(job)

        runner.collect = prepared
        self.running.service.thread.submit = noted

    def say(self, text: str, **options: Any) -> Any:
        self._answer = self.tokenizer.encode(text + END)
        given: dict[str, Any] = {"model": TINY, "messages": [USER], "tools": TOOLS, "max_tokens": 300, **options}
        return self.client.chat.completions.create(**given)


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together as clients do it, and checked on the way."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in stream:
        for choice in piece.choices:
            state = choices.setdefault(choice.index, {"content": "", "calls": [], "finish": None})
            assert state["finish"] is None, "nothing comes after the end"
            state["content"] += choice.delta.content or ""
            state["finish"] = choice.finish_reason
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(state["calls"]) and call.type == "function"
                    assert call.function.name and call.function.arguments == ""
                    state["calls"].append([call.function.name, []])
                else:
                    assert call.function.name is None and call.type is None
                    state["calls"][call.index][1].append(call.function.arguments)
    return choices


@pytest.mark.parametrize(("kind", "stage"), [("hermes", "m1"), ("llama3_json", "m3"), ("hermes", "m7")])
def test_calls_are_told_from_text_whole_and_streamed(serve: Serve, kind: str, stage: str) -> None:
    prepared = Prepared(serve, TEMPLATES[kind], stage=stage)
    whole = prepared.say(ANSWERS[kind])
    [choice] = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "weather", KÖLN), ("function", "clock", NOW),
    ]  # fmt: skip
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    assert whole.usage.completion_tokens == len(ANSWERS[kind].encode()) + 1
    [streamed] = joined(prepared.say(ANSWERS[kind], stream=True)).values()
    assert streamed["content"] == "" and streamed["finish"] == "tool_calls"
    assert [(name, "".join(pieces)) for name, pieces in streamed["calls"]] == [("weather", KÖLN), ("clock", NOW)]
    assert len(streamed["calls"][0][1]) > 10, "arguments come as they are made"
    if kind == "hermes":
        assert prepared.prompts[0].endswith(";weather clock a:")


def test_text_before_a_call_is_content(serve: Serve) -> None:
    prepared = Prepared(serve)
    answer = f"Let me see. 1 < 2\n\n{ANSWERS['hermes']}"
    message = prepared.say(answer).choices[0].message
    assert message.content == "Let me see. 1 < 2" and len(message.tool_calls) == 2
    [streamed] = joined(prepared.say(answer, stream=True)).values()
    assert streamed["content"] == "Let me see. 1 < 2" and len(streamed["calls"]) == 2


NO_CALLS = [
    "No tool.",
    "  spaced \n",
    "<tool_call>",
    "<tool_ca",
    "a <tool_call> b",
    "<tool_call>not json</tool_call>",
    '<tool_call>{"name": "weather"}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": [], "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": "x"}</tool_call>',
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": NaN}, "name": "weather"}</tool_call>',
    '<tool_call>{"arguments": {"a": ' + "9" * 150 + '}, "nam": "weather"}</tool_call>',
    "</tool_call>",
    "<tool_call>" + "[" * 150,
]


def test_what_is_no_call_stays_content(serve: Serve) -> None:
    prepared = Prepared(serve)
    for answer in NO_CALLS:
        choice = prepared.say(answer).choices[0]
        assert choice.message.content == answer and choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
        [streamed] = joined(prepared.say(answer, stream=True)).values()
        assert streamed == {"content": answer, "calls": [], "finish": "stop"}


def test_a_call_that_is_cut_off(serve: Serve) -> None:
    """Whole, it is content; in a stream, its arguments have left already. The reason is the length in both."""
    prepared = Prepared(serve)
    choice = prepared.say(ANSWERS["hermes"], max_tokens=60).choices[0]
    assert choice.finish_reason == "length" and choice.message.content == ANSWERS["hermes"].encode()[:60].decode()
    [streamed] = joined(prepared.say(ANSWERS["hermes"], max_tokens=60, stream=True)).values()
    assert streamed["finish"] == "length" and streamed["calls"][0][0] == "weather"
    assert KÖLN.startswith("".join(streamed["calls"][0][1]).rstrip())


def test_one_call_where_they_must_not_be_parallel(serve: Serve) -> None:
    prepared = Prepared(serve)
    answer = prepared.say(ANSWERS["hermes"], parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["weather"]
    [streamed] = joined(prepared.say(ANSWERS["hermes"], parallel_tool_calls=False, stream=True)).values()
    assert [name for name, _ in streamed["calls"]] == ["weather"] and streamed["finish"] == "tool_calls"


def test_n_answers_with_logprobs_a_stop_string_and_usage(serve: Serve) -> None:
    prepared = Prepared(serve)
    options: dict[str, Any] = {"n": 2, "stop": ["</tool_call>\n<"], "logprobs": True, "top_logprobs": 1}
    whole = prepared.say(ANSWERS["hermes"], **options)
    for choice in whole.choices:
        assert [call.function.arguments for call in choice.message.tool_calls] == [KÖLN]
        assert choice.finish_reason == "tool_calls"
    count = len(whole.choices[0].logprobs.content)
    pieces = list(prepared.say(ANSWERS["hermes"], **options, stream=True, stream_options={"include_usage": True}))
    assert [state["calls"][0][0] for state in joined(pieces).values()] == ["weather", "weather"]
    for index in (0, 1):
        mine = [c for piece in pieces for c in piece.choices if c.index == index and c.logprobs]
        tokens = [entry.token for c in mine for entry in c.logprobs.content or ()]
        assert len(tokens) == count and "".join(tokens).startswith("<tool_call>\n{")
    assert pieces[-1].usage == whole.usage


def test_no_tools_no_calls(serve: Serve) -> None:
    prepared = Prepared(serve)
    for options in ({"tool_choice": "none"}, {"tools": []}, {"tools": openai.NOT_GIVEN}):
        choice = prepared.say(ANSWERS["hermes"], **options).choices[0]
        assert choice.message.content == ANSWERS["hermes"] and choice.finish_reason == "stop"
    assert not any("weather" in prompt for prompt in prepared.prompts)
    assert prepared.say(ANSWERS["hermes"], tool_choice="auto").choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_is_rendered(serve: Serve) -> None:
    prepared = Prepared(serve)
    first = prepared.say(ANSWERS["hermes"]).choices[0].message
    assert first.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "no"} for call in first.tool_calls]
    answer = prepared.say("No rain.", messages=[USER, first.model_dump(), *results])
    assert answer.choices[0].message.content == "No rain."
    assert prepared.prompts[-1] == "u:Rain in Köln?;a:<tool_call>Köln<tool_call>;t:no;t:no;weather clock a:"


def test_the_clients_own_helpers_work(serve: Serve) -> None:
    class weather(BaseModel):
        city: str
        days: list[float]

    prepared = Prepared(serve)
    prepared.say(ANSWERS["hermes"])
    given: dict[str, Any] = {"model": TINY, "messages": [USER], "tools": [openai.pydantic_function_tool(weather)]}
    message = prepared.client.chat.completions.parse(**given).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == weather(city="Köln", days=[1, 2])
    with prepared.client.chat.completions.stream(**given) as stream:
        kinds = Counter(event.type for event in stream)
        final = stream.get_final_completion().choices[0]
    assert kinds["tool_calls.function.arguments.done"] == 1 and kinds["tool_calls.function.arguments.delta"] > 5
    assert final.message.tool_calls is not None and final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.parsed_arguments == weather(city="Köln", days=[1, 2])


def test_a_template_without_tools_gets_them_as_text(serve: Serve) -> None:
    prepared = Prepared(serve, template=None)
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": ""}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "1", "content": "12:00"}]  # fmt: skip
    said = prepared.say(ANSWERS["hermes"], messages=turns, tools=[CLOCK, WEATHER], max_tokens=1)
    assert said.choices[0].finish_reason == "length"
    prompt = prepared.prompts[0]
    assert prompt.startswith("s:# Tools") and '{"name": "clock", "description": "The time"}' in prompt
    assert prompt.endswith(
        ';u:Rain in Köln?;a:<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>;'
        "u:<tool_response>\n12:00\n</tool_response>;a:"
    )
    prepared.say("x", messages=turns, tools=[])
    assert prepared.prompts[1].startswith("u:Rain"), "without tools, calls that were made are still told"


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tool_choice": "sometimes"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "at least 1"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "Missing required"),
        ({"messages": [USER, {"role": "tool", "content": 5}]}, "messages[1].content", "valid string"),
        ({"messages": [USER, {"role": "user", "content": "x", "name": 5}]}, "messages[1].name", "valid string"),
        ({"messages": [USER, USER | {"foo": 1}]}, "messages[1].foo", "Unknown parameter"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "Missing required",
        ),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": wrong}}]}]},
                "messages[0].tool_calls[0].function.arguments",
                "no JSON object",
            )
            for wrong in ("{", "[]", "5")
        ),
    ],
)
def test_what_cannot_be_names_its_field(running: Running, change: dict[str, Any], param: str, says: str) -> None:
    body = {"model": TINY, "messages": [USER], "tools": TOOLS, "max_tokens": 4} | change
    error = error_of(running.post("/v1/chat/completions", body), 400)
    assert error["param"] == param and says in error["message"]


def test_the_embedded_model_is_told_of_tools(serve: Serve) -> None:
    running = serve(engine={"model": DEFAULT_MODEL, "max_num_seqs": 2, "max_model_len": 512}, talks=False)
    options: dict[str, Any] = {"model": DEFAULT_MODEL, "messages": [USER], "tools": TOOLS, "max_tokens": 12,
                               "temperature": 0}  # fmt: skip
    whole = running.client.chat.completions.create(**options)
    [streamed] = joined(running.client.chat.completions.create(**options, stream=True)).values()
    message = whole.choices[0].message
    assert whole.usage is not None and whole.usage.prompt_tokens > 100
    assert message.content or message.tool_calls
    assert streamed["finish"] == whole.choices[0].finish_reason
    if message.tool_calls is None:
        assert streamed["content"] == message.content


# -- parsers -----------------------------------------------------------------------------------------------------------


def parse(kind: str, pieces: list[str], eager: bool) -> tuple[str, list[tuple[str, str]]]:
    parser, content, calls = PARSERS[kind](NAMES, True, eager), "", list[tuple[str, str]]()
    for number, piece in enumerate(pieces):
        for part in parser.feed(piece, end=number == len(pieces) - 1):
            if isinstance(part, str):
                content += part
            elif "id" in part:
                calls.append((part["function"]["name"], ""))
            else:
                calls[-1] = calls[-1][0], calls[-1][1] + part["function"]["arguments"]
    return content, calls


def cuts(text: str, random: Random) -> Iterator[str]:
    while text:
        size = random.choice([1, 1, 2, 5, 30])
        yield text[:size]
        text = text[size:]


TRICKY = {
    "hermes": [
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>} \\"{"}}</tool_call>',
        '<tool_call>{"arguments": {"a": {"arguments": {}}}, "name": "clock"}</tool_call> and so  on\n',
        '<tool_call>{"name": "clock", "arguments": {}}',
        '<tool_call>{"name": "clock", "arguments": {}} so </tool_call>',
        'x<tool_call>{"name":"clock","arguments":{ }}</tool_call><tool_call>{"name":"weather","arguments":{"c":1}}',
        '<tool_call>\n{"name": "clock", "arguments": {"a": [{}, {"b": "}"}]}}\n</tool_call>\n\n',
        '<think>\n<tool_call>\n</think> hm <tool_call>{"name": "clock", "arguments": {}}</tool_call>',
    ],
    "llama3_json": [
        '<|python_tag|>{"name": "clock", "parameters": {}}', '\n {"name": "clock", "parameters": {"a": ";"}} ;\n'
        '{"name": "weather", "parameters": {"b": "{"}}\n', '{"answer": 5} is all', '{"answer": ', '{"name": "Anna"}',
        'Say {"name": "clock", "parameters": {}}', '{"type": "function", "name": "clock", "parameters": {"x": "é"}}',
        '{"name": "clock", "arguments": {}}', "", "  ", "<|pyth", '{"name": "clock", "parameters": {}} so',
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", TRICKY)
def test_the_pieces_make_no_difference(kind: str) -> None:
    random = Random(5)
    for text in [*TRICKY[kind], ANSWERS[kind]]:
        content, calls = parse(kind, [text], eager=False)
        assert calls or content == text, text
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
        for eager in (False, True):
            for _ in range(30):
                assert parse(kind, list(cuts(text, random)) or [""], eager) == (content, calls), text


def test_tricky_calls_are_found() -> None:
    found = [parse("hermes", [text], False) for text in TRICKY["hermes"]]
    assert [len(calls) for _, calls in found] == [1, 1, 1, 1, 2, 1, 0]
    assert found[1] == ("and so  on", [("clock", '{"a": {"arguments": {}}}')])
    found = [parse("llama3_json", [text], False) for text in TRICKY["llama3_json"]]
    assert [len(calls) for _, calls in found] == [1, 2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (TEMPLATES["hermes"], "hermes"),
        (TEMPLATES["llama3_json"], "llama3_json"),
        ("{{ messages }}", "hermes"),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call>"}, "hermes"),
        ("{{ tools }}[TOOL_CALLS]", None),
        ('{{ tools }}{"name": "f", "parameters": {}}', None),
        ("{{ tools }}<tool_call><function=", None),
    ],
)
def test_the_template_tells_the_format(template: Templates, kind: str | None) -> None:
    assert choose(template, TOOLS) == kind
