"""Fields of other servers, whole numbers, usage, token texts, and /tokenize."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from common.serving import schema
from common.serving.errors import from_validation
from common.serving.schema import NEUTRAL, NO_EFFECT, ChatRequest, CompletionRequest
from tests.serving.running import ROOT, TINY, Running, error_of
from tests.test_cli import byte_tokenizer

Serve = Callable[..., Running]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {"model": TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def test_fields_without_effect_are_taken_and_named_once(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_named", set())
    plain = running.post("/v1/completions", PROMPT).json()["choices"]
    with caplog.at_level(logging.INFO, logger="folovllm.serving"):
        for _ in range(2):
            given = PROMPT | {name: {"any": ["thing"]} for name in NO_EFFECT}
            assert running.post("/v1/completions", given).json()["choices"] == plain
            assert running.post("/v1/chat/completions", CHAT | dict.fromkeys(NO_EFFECT, 1)).status_code == 200
    named = [record.fields["field"] for record in caplog.records if "without effect" in record.getMessage()]  # pyright: ignore
    assert sorted(named) == sorted(NO_EFFECT)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_fields_that_would_change_the_answer_are_refused(running: Running, path: str) -> None:
    body = PROMPT if path == "completions" else CHAT
    neutral = {name: values[0] for name, values in NEUTRAL.items() if values}
    assert running.post(f"/v1/{path}", body | neutral).status_code == 200
    assert running.post(f"/v1/{path}", body | dict.fromkeys(NEUTRAL)).status_code == 200, "null is not given"
    for name in NEUTRAL:
        with pytest.raises(ValidationError) as wrong:
            (CompletionRequest if path == "completions" else ChatRequest).model_validate(body | {name: ["x"]})
        refused = from_validation(wrong.value.errors())
        assert (refused.param, refused.code, refused.status_code) == (name, "unsupported_parameter", 400)
    error = error_of(running.post(f"/v1/{path}", body | {"store": True}), 400)
    assert (error["param"], error["code"]) == ("store", "unsupported_parameter")
    special = {"add_special_tokens": path == "completions"}
    assert running.post(f"/v1/{path}", body | special).status_code == 200
    error_of(running.post(f"/v1/{path}", body | {"add_special_tokens": path != "completions"}), 400)


def test_the_readme_lists_the_fields() -> None:
    page = (ROOT / "common" / "serving" / "README.md").read_text(encoding="utf-8")
    table = page.partition("| fields of others | here |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()[2:]]
    accepted, refused = (
        {name for names, here in rows if here.startswith(kind) for name in re.findall(r"`(\w+)`", names)}
        for kind in ("accepted", "refused")
    )
    assert (accepted, refused) == (NO_EFFECT, {*NEUTRAL, "add_special_tokens", "echo"})


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_whole_number_may_have_a_point(running: Running, path: str) -> None:
    body = PROMPT if path == "completions" else CHAT
    numbers: dict[str, Any] = {"max_tokens": 3.0, "n": 2.0, "top_k": 12.0, "seed": 5.0, "min_tokens": 1.0,
                               "stop_token_ids": [9.0, 8]}  # fmt: skip
    answer = running.post(f"/v1/{path}", body | numbers).json()
    whole = {name: value if name == "stop_token_ids" else int(value) for name, value in numbers.items()}
    assert answer["choices"] == running.post(f"/v1/{path}", body | whole).json()["choices"]
    assert answer["usage"]["completion_tokens"] == 6
    for wrong in (3.5, "3", True, 1e400):
        sent = json.dumps(body | {"max_tokens": wrong})
        response = running.http.post(f"/v1/{path}", content=sent, headers={"Content-Type": "application/json"})
        assert error_of(response, 400)["param"] in ("max_tokens", None)


def test_token_ids_may_have_a_point_and_deep_lists_are_refused(running: Running) -> None:
    for prompt in ([104.0, 105], [[104.0, 105.0]]):
        answer = running.post("/v1/completions", PROMPT | {"prompt": prompt}).json()
        assert answer["choices"] == running.post("/v1/completions", PROMPT | {"prompt": [104, 105]}).json()["choices"]
    deep: Any = 1.0
    for _ in range(400):
        deep = [deep]
    error_of(running.post("/v1/completions", PROMPT | {"prompt": deep}), 400)


def test_best_of_is_n_and_stop_has_64(running: Running) -> None:
    assert running.post("/v1/completions", PROMPT | {"n": 2, "best_of": 2}).status_code == 200
    assert running.post("/v1/completions", PROMPT | {"best_of": 1.0}).status_code == 200
    for n, best_of in ((None, 2), (2, 3), (2, 1)):
        error = error_of(running.post("/v1/completions", PROMPT | {"n": n, "best_of": best_of}), 400)
        assert error["param"] == "best_of"
    stops = [f"stop {i}" for i in range(63)]
    whole = running.post("/v1/completions", PROMPT | {"max_tokens": 30}).json()["choices"][0]["text"]
    ended = running.post("/v1/completions", PROMPT | {"max_tokens": 30, "stop": [*stops, whole[5:8]]}).json()
    assert ended["choices"][0]["text"] == whole[: whole.index(whole[5:8])]


def test_a_priority_needs_the_policy(serve: Serve) -> None:
    running = serve()
    assert running.post("/v1/completions", PROMPT | {"priority": 0}).status_code == 200
    assert error_of(running.post("/v1/completions", PROMPT | {"priority": 1}), 400)["param"] == "priority"
    running = serve(engine={"scheduling_policy": "priority"})
    seen: list[int] = []
    add = running.engine.add_request

    def add_request(*given: Any, priority: int = 0, **options: Any) -> str:
        seen.append(priority)
        return add(*given, priority=priority, **options)

    running.engine.add_request = add_request
    for priority in (-5, 7.0, None):
        assert running.post("/v1/completions", PROMPT | {"priority": priority}).status_code == 200
    assert seen == [-5, 7, 0]
    assert error_of(running.post("/v1/completions", PROMPT | {"priority": 2**63}), 400)["param"] == "priority"


def test_usage_in_every_piece(running: Running) -> None:
    for path, body in (("completions", PROMPT), ("chat/completions", CHAT)):
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        text = running.post(f"/v1/{path}", body | {"n": 2} | options).text
        pieces = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
        counts = [piece["usage"]["completion_tokens"] for piece in pieces]
        assert counts == sorted(counts) and counts[-1] == 8 and counts[0] < 5
        assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {pieces[-1]["usage"]["prompt_tokens"]}
        assert pieces[-1]["choices"] == []
        without = running.post(
            f"/v1/{path}", body | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        )
        assert "usage" not in without.text, "as in vLLM, it takes both"


def test_cached_tokens_are_told(serve: Serve) -> None:
    running = serve("m6", engine={"block_size": 4})
    body = PROMPT | {"prompt": "x" * 40}

    def cached(**more: Any) -> int:
        return running.post("/v1/completions", body | more).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert (cached(), cached()) == (0, 36)
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    events = running.post("/v1/completions", body | options).text.split("\n\n")[:-2]
    usages = [json.loads(event[6:])["usage"]["prompt_tokens_details"]["cached_tokens"] for event in events]
    assert set(usages) == {36}, "from the first piece on"
    assert (cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")) == (0, 36, 0)
    assert serve().post("/v1/completions", body).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


# -- token texts -------------------------------------------------------------------------------------------------------


def test_every_token_has_its_bytes(serve: Serve) -> None:
    running = serve()
    running.engine.tokenizer = tokenizer = byte_tokenizer()
    answer = running.post("/v1/chat/completions", CHAT | {"max_tokens": 40, "logprobs": True, "top_logprobs": 5}).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    for entry in (e for one in entries for e in (one, *one["top_logprobs"])):
        assert len(entry["bytes"]) == 1 or not entry["token"], "in this vocabulary"
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
    told = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert told.decode(errors="replace") == answer["choices"][0]["message"]["content"]
    assert tokenizer.token_bytes(tokenizer.encode("é")[0]) == b"\xc3"


def test_offsets_are_those_of_the_text_and_alternatives_are_kept_apart(running: Running) -> None:
    body = PROMPT | {"max_tokens": 60, "temperature": 1, "seed": 3, "logprobs": 20}
    choice = running.post("/v1/completions", body).json()["choices"][0]
    text, logprobs = choice["text"], choice["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(text)]
    for token, start, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True):
        assert token.startswith("\ufffd") or text[start:end].endswith(token) or text[start:] == text[start:end]
    assert logprobs["text_offset"] != list(range(60)), "some tokens are parts of a character"
    for token, value, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert len(top) in (20, 21) and top[token] == value
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert any(name.startswith("token_id:") for top in logprobs["top_logprobs"] for name in top)
    streamed: list[int] = []
    for line in running.post("/v1/completions", body | {"stream": True}).text.split("\n\n")[:-2]:
        more = json.loads(line[6:])["choices"][0]["logprobs"]
        streamed += more["text_offset"] if more else []
    assert streamed == logprobs["text_offset"]


# -- /tokenize ---------------------------------------------------------------------------------------------------------


def test_texts_and_chats_are_tokenized_and_back(running: Running) -> None:
    tokenizer = running.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("héllo")
    answer = running.post("/tokenize", {"model": TINY, "prompt": "héllo", "return_token_strs": True})
    assert answer.json() == {
        "count": 6, "max_model_len": 512, "tokens": ids, "token_strs": ["h", "Ã", "©", "l", "l", "o"],
    }  # fmt: skip
    assert running.post("/tokenize", {"prompt": "héllo", "add_special_tokens": False}).json()["tokens"] == ids
    chat = running.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert chat["tokens"] == tokenizer.chat(CHAT["messages"]) and chat["token_strs"] is None
    assert running.post("/v1/chat/completions", CHAT).json()["usage"]["prompt_tokens"] == chat["count"]
    assert running.post("/detokenize", {"model": TINY, "tokens": ids}).json() == {"prompt": "héllo"}
    assert running.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert running.post("/detokenize", {"tokens": [104.0]}).json()["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("tokenize", {}, 400),
        ("tokenize", {"prompt": "a", "messages": CHAT["messages"]}, 400),
        ("tokenize", {"prompt": ""}, 400),
        ("tokenize", {"prompt": "x" * 600}, 400),
        ("tokenize", {"prompt": "a", "model": "gpt-9"}, 404),
        ("tokenize", {"messages": CHAT["messages"], "continue_final_message": True}, 400),
        ("tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, 400),
        ("detokenize", {}, 400),
        ("detokenize", {"tokens": [-1]}, 400),
        ("detokenize", {"tokens": [2**40]}, 400),
        ("detokenize", {"tokens": [1], "model": "gpt-9"}, 404),
    ],
)
def test_what_cannot_be_tokenized(running: Running, path: str, body: dict[str, Any], status: int) -> None:
    error_of(running.post(f"/{path}", body), status)
