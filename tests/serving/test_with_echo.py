"""`echo`: the prompt in front of the answer, with the log-probabilities that evaluation harnesses compare."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from common import SamplingParams
from tests.serving.running import SOME, TINY, Running, error_of

Serve = Callable[..., Running]
BODY: dict[str, Any] = {"model": TINY, "prompt": "Größe", "max_tokens": 5, "temperature": 0, "echo": True}
KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.mark.parametrize("stage", SOME)
def test_the_logprobs_are_the_engines_of_prompt_and_answer(serve: Serve, stage: str) -> None:
    running = serve(stage)
    prompt = running.engine.tokenizer.encode("Größe")  # type: ignore
    choice = running.client.completions.create(**BODY, logprobs=3).choices[0]
    plain = running.client.completions.create(**BODY | {"echo": False}, logprobs=3).choices[0]
    assert choice.text == "Größe" + plain.text and choice.logprobs and plain.logprobs
    (output,) = running.engine.generate([prompt], SamplingParams(max_tokens=5, prompt_logprobs=3, logprobs=3))
    assert output.prompt_logprobs and output.logprobs
    expected = [None, *(v and v[t] for t, v in zip(prompt[1:], output.prompt_logprobs[1:], strict=True))]
    assert choice.logprobs.token_logprobs[: len(prompt)] == expected
    assert choice.logprobs.token_logprobs[len(prompt) :] == pytest.approx(plain.logprobs.token_logprobs)
    assert choice.logprobs.tokens[len(prompt) :] == plain.logprobs.tokens
    assert choice.logprobs.top_logprobs[0] is None
    assert all(top is None or len(top) in (3, 4) for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[: len(prompt)] == [0, 1, 2, 2, 3, 3, 4][: len(prompt)], "ö and ß have two bytes"
    assert choice.logprobs.text_offset[len(prompt) :] == [5 + offset for offset in plain.logprobs.text_offset]


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"logprobs": 0, "max_tokens": 0}, {"max_tokens": 0}], ids=str)
@pytest.mark.parametrize("prompt", ["hello", [[104, 105], [106]], ["one", "two and more"]], ids=str)
def test_a_stream_brings_what_a_whole_answer_has(running: Running, prompt: Any, extra: dict[str, Any]) -> None:
    body = BODY | {"prompt": prompt, "n": 2, "temperature": 1, "seed": 4} | extra
    whole = running.post("/v1/completions", body).json()
    events = running.post("/v1/completions", body | {"stream": True}).text.split("\n\n")[:-2]
    pieces = [json.loads(event[6:])["choices"][0] for event in events]
    prompts = prompt if isinstance(prompt, list) else [prompt]
    assert len(whole["choices"]) == 2 * len(prompts)
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        given = prompts[choice["index"] // 2]
        text = given if isinstance(given, str) else running.engine.tokenizer.decode(given)  # type: ignore
        assert choice["text"].startswith(text) and choice["finish_reason"] == mine[-1]["finish_reason"] == "length"
        if "logprobs" not in extra:
            assert choice["logprobs"] is None
            continue
        for key in KEYS:
            assert [*chain(*(piece["logprobs"][key] for piece in mine))] == choice["logprobs"][key]
    count = 2 * len(prompts) * body["max_tokens"]
    assert whole["usage"]["completion_tokens"] == count
    running.wait_until_idle()


def test_a_model_without_a_tokenizer_echoes_token_ids(serve: Serve) -> None:
    running = serve("m6", talks=False)
    choice = running.post("/v1/completions", BODY | {"prompt": [7, 8, 300], "logprobs": 0}).json()["choices"][0]
    ends = [*choice["logprobs"]["text_offset"][1:], None]
    texts = [choice["text"][start:end] for start, end in zip(choice["logprobs"]["text_offset"], ends, strict=True)]
    assert texts == choice["logprobs"]["tokens"] and texts[:3] == ["7 ", "8 ", "300 "]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_no_token_needs_an_echo(running: Running, path: str) -> None:
    body = {"model": TINY, "prompt": "hello", "max_tokens": 0}
    chat = {"model": TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 0}
    error = error_of(running.post(f"/v1/{path}", body if path == "completions" else chat), 400)
    assert error["param"] == "max_tokens" and "greater than or equal to 1" in error["message"]
    error_of(running.post(f"/v1/{path}", (body if path == "completions" else chat) | {"echo": "yes"}), 400)


def test_repeated_prompts_are_scored_although_they_are_cached(serve: Serve) -> None:
    running = serve("m6", {"block_size": 4})
    body = BODY | {"prompt": "the same beginning again", "logprobs": 1}
    first, second = (running.post("/v1/completions", body).json() for _ in range(2))
    assert second["choices"] == first["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("stage", SOME)
def test_a_prompt_without_an_answer_counts_once(serve: Serve, stage: str) -> None:
    running = serve(stage)
    usage = running.post("/v1/completions", BODY | {"max_tokens": 0, "n": 3}).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 0)
    assert "folovllm_prompt_tokens_total 7.0" in re.sub(r"\{[^}]*\}", "", running.get("/metrics").text)
