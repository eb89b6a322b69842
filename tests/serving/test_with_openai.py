"""The real `openai` client against a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from common import Engine
from common.config import DEFAULT_MODEL
from common.sampling_params import SamplingParams
from common.serving.engine_thread import Job
from tests.serving.running import ALL, TINY, Running
from tests.test_cli import byte_tokenizer

Serve = Callable[..., Running]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("stage", ALL)
def test_every_stage_gives_the_tokens_of_its_engine(serve: Serve, build: Callable[..., Engine], stage: str) -> None:
    running = serve(stage, talks=False)
    prompt = [5, 6, 7, 8, 9]
    completion = running.client.completions.create(model=TINY, prompt=prompt, max_tokens=8, temperature=0)
    [expected] = build(stage).generate([prompt], SamplingParams(max_tokens=8))
    assert completion.choices[0].text.split() == [str(token) for token in expected.token_ids]
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 8)
    assert completion.usage.total_tokens == 13
    running.wait_until_idle()


def test_the_embedded_model_chats(serve: Serve) -> None:
    running = serve(engine={"model": DEFAULT_MODEL, "max_num_seqs": 2, "max_model_len": 256}, talks=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    whole = running.client.chat.completions.create(model=DEFAULT_MODEL, messages=question, max_tokens=10, temperature=0)
    assert "Paris" in str(whole.choices[0].message.content)
    pieces = running.client.chat.completions.create(
        model=DEFAULT_MODEL, messages=question, max_completion_tokens=10, temperature=0, stream=True
    )
    streamed = [piece.choices[0] for piece in pieces]
    assert [piece.delta.role for piece in streamed] == ["assistant", *[None] * (len(streamed) - 1)]
    assert "".join(piece.delta.content or "" for piece in streamed) == whole.choices[0].message.content
    assert len(streamed) > 4
    assert [piece.finish_reason for piece in streamed if piece.finish_reason] == [whole.choices[0].finish_reason]


def test_models_are_listed_and_found_by_name(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == [TINY]
    assert running.client.models.retrieve(TINY).owned_by == "folovllm"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        running.client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError, match=f"This server has '{TINY}'") as error:
        running.client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert error.value.code == "model_not_found"


def test_n_answers_differ_and_their_streams_do_not_mix(running: Running) -> None:
    options = {"model": TINY, "messages": HELLO, "n": 3, "max_tokens": 12, "seed": 7}
    whole = running.client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for piece in running.client.chat.completions.create(**options, stream=True):
        for choice in piece.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert whole.usage is not None and whole.usage.completion_tokens == 36


def test_an_answer_that_has_ended_gains_nothing_while_the_others_go_on(running: Running) -> None:
    options = {"model": TINY, "messages": HELLO, "n": 3, "max_tokens": 12, "seed": 7}
    first, *others = (str(one.message.content) for one in running.client.chat.completions.create(**options).choices)
    pairs = [first[i : i + 2] for i in range(2, 6)]
    stop = next(pair for pair in pairs if not any(pair in other for other in others))
    stream = running.client.chat.completions.create(**options, stop=stop, stream=True)
    seen = [(choice.index, choice.finish_reason) for piece in stream for choice in piece.choices]
    assert {end for end in seen if end[1]} == {(0, "stop"), (1, "length"), (2, "length")}
    after = [index for index, _ in seen[seen.index((0, "stop")) + 1 :]]
    assert after and 0 not in after


def test_several_prompts_are_answered_in_order(running: Running) -> None:
    together = running.client.completions.create(
        model=TINY, prompt=["one", "two"], n=2, max_tokens=5, seed=3, temperature=0.7
    )
    alone = [
        running.client.completions.create(model=TINY, prompt=prompt, n=2, max_tokens=5, seed=3, temperature=0.7)
        for prompt in ("one", "two")
    ]
    assert [c.index for c in together.choices] == [0, 1, 2, 3]
    assert [c.text for c in together.choices] == [c.text for one in alone for c in one.choices]
    ids = running.client.completions.create(
        model=TINY, prompt=[list(b"one"), list(b"two")], max_tokens=5, temperature=0
    )
    assert len(ids.choices) == 2


def test_a_seed_repeats_and_another_one_does_not(running: Running) -> None:
    def text(seed: int | None) -> str:
        return running.client.completions.create(model=TINY, prompt="x", max_tokens=20, seed=seed).choices[0].text

    assert text(1) == text(1) != text(2)
    assert text(-2) == text(-2)
    assert text(None) != text(None)
    assert text(-1) != text(-1), "any"


def test_a_stop_text_ends_the_answer_and_is_not_in_it(running: Running) -> None:
    whole = running.client.completions.create(model=TINY, prompt="x", max_tokens=30, temperature=0).choices[0].text
    stop = whole[10:12]
    ended = running.client.completions.create(model=TINY, prompt="x", max_tokens=30, temperature=0, stop=[stop, "\0\0"])
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].text == whole[: whole.index(stop)]
    pieces = running.client.completions.create(
        model=TINY, prompt="x", max_tokens=30, temperature=0, stop=stop, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == ended.choices[0].text


def test_the_tokens_are_those_of_the_text_before_the_stop(running: Running) -> None:
    options: dict[str, Any] = {"model": TINY, "prompt": "x", "max_tokens": 30, "temperature": 0, "logprobs": 0}
    whole = running.client.completions.create(**options).choices[0].text
    stop = whole[10:13]
    cut = whole.index(stop)
    ended = running.client.completions.create(**options, stop=stop)
    assert ended.choices[0].logprobs is not None and ended.choices[0].logprobs.tokens is not None
    tokens = ended.choices[0].logprobs.tokens
    assert "".join(tokens) == whole[:cut] == ended.choices[0].text and tokens[-1]
    assert ended.usage is not None and ended.usage.completion_tokens >= len(tokens) + len(stop), "all were generated"
    streamed: list[str] = []
    for piece in running.client.completions.create(**options, stop=stop, stream=True):
        new = piece.choices[0].logprobs.tokens if piece.choices[0].logprobs else None
        assert "".join(new or ()) == piece.choices[0].text, "a token comes with its text, and never before"
        streamed += new or ()
    assert streamed == tokens


def test_top_p_0_is_greedy(running: Running) -> None:
    options: dict[str, Any] = {"model": TINY, "prompt": "x", "max_tokens": 20}
    answers = [running.client.completions.create(**options, **how) for how in ({"top_p": 0}, {"temperature": 0})]
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_a_chat_ends_with_its_turn_and_a_text_goes_on(serve: Serve) -> None:
    running = serve("m6")
    running.engine.tokenizer = tokenizer = byte_tokenizer()
    options: dict[str, Any] = {"model": TINY, "max_tokens": 12, "temperature": 0}
    chat = running.client.chat.completions.create(**options, messages=HELLO, logprobs=True)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    texts = [entry.token for entry in chat.choices[0].logprobs.content]
    first = next(text for text in texts if text.isascii() and text)
    tokenizer.__dict__["turn_end_token_ids"] = frozenset([tokenizer.encode(first)[-1]])
    ended = running.client.chat.completions.create(**options, messages=HELLO)
    assert ended.choices[0].finish_reason == "stop" and ended.usage is not None
    assert ended.usage.completion_tokens == texts.index(first) + 1
    ids = tokenizer.chat(HELLO)
    text = running.client.completions.create(**options, prompt=list(ids))
    assert text.choices[0].finish_reason == "length"
    ignored = running.client.chat.completions.create(**options, messages=HELLO, extra_body={"ignore_eos": True})
    assert ignored.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat(running: Running) -> None:
    options = {"model": TINY, "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    whole = running.client.chat.completions.create(**options, top_logprobs=3)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy: the likeliest one"
        assert entry.bytes is not None and bytes(entry.bytes).decode(errors="replace") == entry.token
    none = running.client.chat.completions.create(**options)
    assert none.choices[0].logprobs is not None and none.choices[0].logprobs.content is not None
    assert none.choices[0].logprobs.content[0].top_logprobs == []
    streamed = [
        entry.logprob
        for piece in running.client.chat.completions.create(**options, top_logprobs=3, stream=True)
        for entry in (piece.choices[0].logprobs.content or () if piece.choices[0].logprobs else ())
    ]
    assert streamed == [entry.logprob for entry in logprobs.content]


def test_logprobs_of_a_completion(running: Running) -> None:
    whole = running.client.completions.create(model=TINY, prompt="x", max_tokens=6, temperature=0, logprobs=2)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == len(logprobs.top_logprobs or ()) == 6
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    offsets: list[int] = []
    for piece in running.client.completions.create(
        model=TINY, prompt="x", max_tokens=6, temperature=0, logprobs=2, stream=True
    ):
        if piece.choices[0].logprobs:
            offsets += piece.choices[0].logprobs.text_offset or ()
    assert offsets == logprobs.text_offset


def test_a_sampled_token_is_among_the_likeliest_of_a_completion(running: Running) -> None:
    options = {"model": TINY, "prompt": "x", "max_tokens": 8, "temperature": 2, "seed": 1, "logprobs": 1}
    logprobs = running.client.completions.create(**options).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    entries = list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))
    assert all(top[token] >= value for token, value, top in entries), "more, where a likelier one has the same text"
    assert any(top[token] == value and len(top) == 2 for token, value, top in entries), "not all are the likeliest"


def test_usage_comes_last_in_a_stream_that_asks_for_it(running: Running) -> None:
    *pieces, last = running.client.chat.completions.create(
        model=TINY, messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 4
    for piece in running.client.chat.completions.create(model=TINY, messages=HELLO, max_tokens=4, stream=True):
        assert piece.usage is None and piece.choices


def test_our_own_parameters_arrive(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []
    submit = running.service.thread.submit
    monkeypatch.setattr(running.service.thread, "submit", lambda job: (seen.append(job), submit(job)))
    extra: dict[str, Any] = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True}
    running.client.chat.completions.create(
        model=TINY, messages=HELLO, max_tokens=3, temperature=0.5, top_p=0.9, presence_penalty=0.3,
        frequency_penalty=0.4, stop=["."], extra_body={**extra, "stop_token_ids": [9]}, user="me",
    )  # fmt: skip
    params = seen[0].params
    assert {name: getattr(params, name) for name in extra} == extra | {"top_k": 0}
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 3)
    assert (params.presence_penalty, params.frequency_penalty) == (0.3, 0.4)
    assert (params.stop_strings, params.stop_token_ids) == ((".",), (9,))


def test_roles_and_parts_reach_the_template(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []
    submit = running.service.thread.submit
    monkeypatch.setattr(running.service.thread, "submit", lambda job: (seen.append(job), submit(job)))
    running.client.chat.completions.create(
        model=TINY,
        max_tokens=1,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    assert byte_tokenizer().decode(seen[0].prompt) == "s:be brief;u:a\nb;a:c;u:d;a:"


def test_variables_of_a_chat_reach_its_template(running: Running) -> None:
    tokenizer = running.service.engine.tokenizer
    assert tokenizer is not None
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{{ messages[0].name }}{{ '' if enable_thinking is defined and not enable_thinking else 'think' * 9 }}"
    )
    counts: list[int] = []
    try:
        for extra in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
            answer = running.client.chat.completions.create(
                model=TINY, max_tokens=1, messages=[{"role": "user", "content": "a", "name": "ann"}], extra_body=extra
            )
            assert answer.usage is not None
            counts.append(answer.usage.prompt_tokens)
    finally:
        tokenizer.chat_template = template
    assert counts == [48, 3]


@pytest.mark.parametrize("value", [5, "{}", ["x"], {"messages": []}, {"tools": []}, {"add_generation_prompt": False}])
def test_bad_variables_of_a_chat_are_refused_by_name(value: object, running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
        running.client.chat.completions.create(model=TINY, messages=HELLO, extra_body={"chat_template_kwargs": value})


def test_without_max_tokens_a_chat_may_fill_the_context_and_a_completion_gets_16(serve: Serve) -> None:
    running = serve(engine={"max_model_len": 64})
    chat = running.client.chat.completions.create(model=TINY, messages=HELLO)
    assert chat.usage is not None and chat.usage.total_tokens == 64
    assert chat.choices[0].finish_reason == "length"
    completion = running.client.completions.create(model=TINY, prompt="hello")
    assert completion.usage is not None and completion.usage.completion_tokens == 16
    nearly = running.client.completions.create(model=TINY, prompt="x" * 60)
    assert nearly.usage is not None and nearly.usage.completion_tokens == 4


def test_two_clients_on_two_engines_in_one_process(serve: Serve) -> None:
    first, second = serve("m1"), serve("m3")
    texts = [
        running.client.completions.create(model=TINY, prompt="same", max_tokens=9, temperature=0).choices[0].text
        for running in (first, second)
    ]
    assert texts[0] == texts[1]
    assert 'stage="m1"' in first.get("/metrics").text and 'stage="m3"' in second.get("/metrics").text
