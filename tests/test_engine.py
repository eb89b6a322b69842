"""The engine's face, the same for every stage: what it refuses, when it stops, what survives an abort or a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from common import Engine, RequestOutput, SamplingParams, UserError
from common.text.tokenizer import ChatPrompt, Tokenizer
from tests.engine_checks import BOOKKEEPING
from tests.integrity import check_integrity

Build = Callable[..., Engine]
PROMPTS = [[5, 6, 7, 8, 9], [400, 3], [17], [100, 200, 300, 400, 500, 11, 12]]
EIGHT = SamplingParams(max_tokens=8)


OVERLAPPED = [pytest.param((stage, {"overlap": True}), id=f"{stage}-overlapped") for stage in BOOKKEEPING]
STEP_BY_STEP = [pytest.param((stage, {}), id=stage) for stage in ("m0", "m1", *BOOKKEEPING)]


@pytest.fixture(params=STEP_BY_STEP + OVERLAPPED)
def engine(request: pytest.FixtureRequest, build: Build) -> Engine:
    stage, options = request.param
    return build(stage, max_num_seqs=2, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def set_eos(engine: Engine, *ids: int) -> None:
    engine.runner.model.config = replace(engine.runner.model.config, eos_token_ids=ids)


def run(engine: Engine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


def assert_idle(engine: Engine) -> None:
    """Nothing runs, waits or is remembered, and the cache has got everything back."""
    metrics = engine.metrics()
    assert (metrics["running"], metrics["waiting"], metrics["kv_reserved_bytes"]) == (0, 0, 0)
    assert not engine.has_unfinished and engine.step() == []
    check_integrity(engine.scheduler.cache)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_can_never_run_is_refused_and_leaves_nothing_behind(engine: Engine) -> None:
    refused: list[tuple[Any, SamplingParams, str]] = [
        ([], EIGHT, "empty"),
        ("", EIGHT, "empty"),
        ([1] * 600, EIGHT, "max_model_len=512"),
        ([1] * 500, SamplingParams(max_tokens=13), "513"),
        ([512], EIGHT, "vocabulary"),
        ([-1], EIGHT, "vocabulary"),
        ("text", EIGHT, "no tokenizer"),
        ([{"role": "user", "content": "text"}], EIGHT, "no tokenizer"),
        ([1], SamplingParams(stop="END"), "stop_token_ids"),
    ]
    for prompt, params, message in refused:
        with pytest.raises(UserError, match=message):
            engine.add_request(prompt, params)
    assert_idle(engine)


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    assert engine.add_request([1], EIGHT, request_id="mine") == "mine"
    with pytest.raises(UserError, match="'mine' is in use"):
        engine.add_request([2], EIGHT, request_id="mine")
    first = run(engine)[-1]
    engine.add_request([1], EIGHT, request_id="mine")
    assert run(engine)[-1].token_ids == first.token_ids


def test_a_closed_engine_takes_nothing_more(engine: Engine) -> None:
    engine.add_request([1], EIGHT)
    engine.step()
    engine.close()
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.add_request([1], EIGHT)
    engine.step()
    assert_idle(engine)


def test_the_context_manager_closes(build: Build) -> None:
    with build() as engine:
        engine.generate([[1]], EIGHT)
    with pytest.raises(UserError, match="closed"):
        engine.generate([[1]], EIGHT)


@pytest.mark.parametrize("prompts", ["a bare string", [1, 2, 3], [{"role": "user", "content": "Hello"}]])
def test_generate_given_one_prompt_says_to_make_it_a_list(engine: Engine, prompts: Any) -> None:
    with pytest.raises(UserError, match=r"\[prompt\]"):
        engine.generate(prompts)


def test_generate_with_one_bad_prompt_runs_none(engine: Engine) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        engine.generate([[1], [2], [9999]], EIGHT)
    with pytest.raises(UserError, match="3 prompts but 2"):
        engine.generate([[1], [2], [3]], [EIGHT, EIGHT])
    assert engine.step() == []
    assert_idle(engine)


def test_a_max_model_len_over_the_models_limit_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match="limit of 512"):
        build(max_model_len=513)


# -- results and their order ------------------------------------------------------------------------------------------


def test_results_come_in_input_order_whichever_ends_first(engine: Engine) -> None:
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 5, 2)]
    outputs = engine.generate(PROMPTS, params)
    assert [o.prompt_token_ids for o in outputs] == PROMPTS
    assert [len(o.token_ids) for o in outputs] == [9, 1, 5, 2]
    assert [o.finish_reason for o in outputs] == ["length"] * 4
    alone = [engine.generate([prompt], p)[0].token_ids for prompt, p in zip(PROMPTS, params, strict=True)]
    assert tokens(outputs) == alone
    assert engine.generate([]) == []
    assert_idle(engine)


def test_default_params_are_sixteen_greedy_tokens(engine: Engine) -> None:
    (output,) = engine.generate([[5, 6]])
    assert len(output.token_ids) == 16
    assert output.token_ids == engine.generate([[5, 6]], SamplingParams(temperature=0.0))[0].token_ids


def test_every_eos_id_of_the_model_ends_a_request(engine: Engine) -> None:
    free = engine.generate([[5, 6]], SamplingParams(max_tokens=12))[0].token_ids
    distinct = [t for i, t in enumerate(free) if t not in free[:i]]
    assert len(distinct) >= 3
    for eos in (distinct[1], distinct[2]):
        set_eos(engine, 511, eos)
        (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
        assert output.finish_reason == "stop"
        assert output.token_ids == free[: free.index(eos) + 1]
    (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert output.token_ids == free and output.finish_reason == "length"


def test_stop_token_ids_end_a_request_even_when_eos_is_ignored(engine: Engine) -> None:
    free = engine.generate([[5, 6]], SamplingParams(max_tokens=12))[0].token_ids
    stop = next(t for i, t in enumerate(free) if i >= 2 and t not in free[:i])
    (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[stop]))
    assert output.token_ids == free[: free.index(stop) + 1] and output.finish_reason == "stop"


def test_min_tokens_postpones_eos_and_stop_tokens(engine: Engine) -> None:
    free = engine.generate([[5, 6]], SamplingParams(max_tokens=12))[0].token_ids
    set_eos(engine, free[0])
    for minimum in (0, 1, 5):
        (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, min_tokens=minimum))
        assert len(output.token_ids) > minimum or (minimum == 0 and output.token_ids == free[:1])
        assert free[0] not in output.token_ids[:minimum]


def test_a_stop_string_ends_the_text_before_it(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.tokenizer = tokenizer
    (free,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    assert free.text == tokenizer.decode(free.token_ids)
    stop = tokenizer.decode(free.token_ids[4:6])
    (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, stop=stop))
    assert output.finish_reason == "stop"
    assert output.text == free.text.split(stop)[0]
    (sample,) = output.outputs
    assert len(output.token_ids) == len(sample.token_times) < sample.num_generated < 12
    assert tokenizer.decode(output.token_ids).startswith(output.text)
    assert not tokenizer.decode(output.token_ids[:-1]).startswith(output.text), "up to the token where the text ends"


def test_tokens_come_with_their_text_and_not_behind_a_stop_string(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.tokenizer = tokenizer
    (free,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    stop = tokenizer.decode(free.token_ids[4:6])
    seen = 0
    for output in engine.stream([[5, 6]], SamplingParams(max_tokens=12, stop=stop, logprobs=1)):
        assert output.token_ids == free.token_ids[: len(output.token_ids)] and len(output.token_ids) >= seen
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
        seen = len(output.token_ids)
        assert not seen or not tokenizer.decode(output.token_ids[:-1]).startswith(output.text)
    assert seen == 4
    (none,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, stop=free.text[0]))
    assert (none.text, none.token_ids, none.logprobs, none.finish_reason) == ("", [], None, "stop")
    assert none.ttft is not None and none.tpot is None


def test_a_stop_string_that_is_a_special_token_is_a_stop_token(engine: Engine, tokenizer: Tokenizer) -> None:
    (free,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    engine.tokenizer = Tokenizer(FastTokenizer.from_str(tokenizer.backend.to_str()))
    end = str(tokenizer.backend.id_to_token(free.token_ids[3]))
    engine.tokenizer.backend.add_special_tokens([end])
    (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, stop=["never", end]))
    assert (output.finish_reason, output.token_ids) == ("stop", free.token_ids[:4])
    assert output.text == tokenizer.decode(free.token_ids[:3])
    (late,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12, min_tokens=6, stop=[end]))
    assert end not in [engine.tokenizer.backend.id_to_token(i) for i in late.token_ids[:6]]
    for stop in (f"a{end}", f"{end}\n", f" {end}"):
        with pytest.raises(UserError, match="can never match"):
            engine.add_request([5, 6], SamplingParams(stop=["fine", stop]))
    assert_idle(engine)


def test_a_chat_ends_where_a_turn_does(engine: Engine, tokenizer: Tokenizer) -> None:
    """At the token that its template writes behind an answer; a text or token ids go on. An end token is no text."""
    (free,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    for special in (True, False):
        backend = FastTokenizer.from_str(tokenizer.backend.to_str())
        end = AddedToken(str(backend.id_to_token(free.token_ids[3])), special=special)
        backend.add_tokens([end])
        behind = f"{end.content} " if special else "<|im_end|>"
        template = (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + behind + "{% endif %}{% endfor %}"
        )
        engine.tokenizer = Tokenizer(backend, chat_template=template)
        if not special:
            engine.tokenizer.__dict__["turn_end_token_ids"] = frozenset([free.token_ids[3]])
        chat, text = engine.generate([ChatPrompt([5, 6]), [5, 6]], SamplingParams(max_tokens=12))
        assert (chat.finish_reason, chat.token_ids) == ("stop", free.token_ids[:4])
        assert chat.text == tokenizer.decode(free.token_ids[:3])
        assert (text.finish_reason, text.token_ids) == ("length", free.token_ids)
        (on,) = engine.generate([ChatPrompt([5, 6])], SamplingParams(max_tokens=12, ignore_eos=True))
        assert on.token_ids == free.token_ids
        (late,) = engine.generate([ChatPrompt([5, 6])], SamplingParams(max_tokens=12, min_tokens=5))
        assert free.token_ids[3] not in late.token_ids[:5]


def test_the_tokenizers_eos_token_ends_an_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    (free,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    set_eos(engine, 3)
    eos = str(tokenizer.backend.id_to_token(free.token_ids[2]))
    engine.tokenizer = Tokenizer(tokenizer.backend, special_tokens={"eos_token": eos})
    (output,) = engine.generate([[5, 6]], SamplingParams(max_tokens=12))
    assert (output.finish_reason, output.token_ids) == ("stop", free.token_ids[:3])


def test_logprobs_of_a_request(engine: Engine) -> None:
    asked, silent = engine.generate([[5, 6], [5, 6]], [SamplingParams(max_tokens=4, logprobs=3), EIGHT])
    assert silent.logprobs is None and asked.logprobs is not None
    assert len(asked.logprobs) == 4
    for token_id, logprobs in zip(asked.token_ids, asked.logprobs, strict=True):
        assert len(logprobs) == 3 and max(logprobs, key=lambda i: logprobs[i]) == token_id
        assert all(value <= 0.0 for value in logprobs.values())


# -- streaming and aborting -------------------------------------------------------------------------------------------


def test_stream_yields_each_request_token_by_token(engine: Engine) -> None:
    counts: dict[str, list[int]] = {}
    last: dict[str, RequestOutput] = {}
    for output in engine.stream(PROMPTS, EIGHT):
        counts.setdefault(output.request_id, []).append(len(output.token_ids))
        last[output.request_id] = output
    assert list(counts.values()) == [list(range(1, 9))] * 4
    assert tokens(list(last.values())) == tokens(engine.generate(PROMPTS, EIGHT))


def test_an_abandoned_stream_computes_nothing_more(engine: Engine) -> None:
    stream = engine.stream(PROMPTS, EIGHT)
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.step() == []
    assert_idle(engine)


def test_an_abandoned_stream_keeps_the_outputs_of_others(build: Build) -> None:
    """Both end in the same step; the stream's reader leaves between the two outputs. Must not swallow them."""
    engine = build(max_num_seqs=2)
    stream = engine.stream([[1]], SamplingParams(max_tokens=1))
    other = engine.add_request([2], SamplingParams(max_tokens=1))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [(o.request_id, o.finish_reason) for o in run(engine)] == [(other, "length")]


def test_two_streams_at_once_both_finish_with_their_own_tokens(engine: Engine) -> None:
    """Must not wait for each other for ever."""
    one, two = engine.stream(PROMPTS[:2], EIGHT), engine.stream(PROMPTS[2:], EIGHT)
    seen: dict[str, RequestOutput] = {}
    for pair in zip(one, two, strict=True):
        seen |= {output.request_id: output for output in pair}
    assert tokens(list(seen.values())) and all(o.finished for o in seen.values())
    by_prompt = {tuple(o.prompt_token_ids): o.token_ids for o in seen.values()}
    assert [by_prompt[tuple(p)] for p in PROMPTS] == tokens(engine.generate(PROMPTS, EIGHT))


def test_a_stream_ends_when_its_engine_is_closed(engine: Engine) -> None:
    """Must not spin for ever."""
    stream = engine.stream(PROMPTS, EIGHT)
    next(stream)
    engine.close()
    assert not any(output.finished for output in stream), "what the last step gave, and then an end"


def test_generate_keeps_the_outputs_of_others_for_the_next_step(engine: Engine) -> None:
    other = engine.add_request([2, 3], SamplingParams(max_tokens=3))
    engine.generate(PROMPTS, EIGHT)
    kept = run(engine)
    assert [(o.request_id, len(o.token_ids)) for o in kept] == [(other, 1), (other, 2), (other, 3)]
    assert kept[-1].finish_reason == "length"
    assert_idle(engine)


def test_abort_of_a_waiting_and_of_a_running_request(engine: Engine) -> None:
    expected = tokens(engine.generate(PROMPTS, EIGHT))
    ids = [engine.add_request(prompt, EIGHT) for prompt in PROMPTS]  # two run, two wait
    engine.step()
    engine.step()
    engine.abort(ids[0])
    engine.abort(ids[2])
    engine.abort(ids[2])
    engine.abort("nobody")
    final = {o.request_id: o for o in run(engine) if o.finished}
    assert [final[i].finish_reason for i in ids] == ["abort", "length", "abort", "length"]
    assert final[ids[0]].token_ids == expected[0][:2] and final[ids[2]].token_ids == []
    assert final[ids[1]].token_ids == expected[1] and final[ids[3]].token_ids == expected[3]
    assert final[ids[2]].ttft is None and final[ids[2]].queue_time is None and final[ids[2]].e2e is not None
    assert engine.metrics()["aborted"] == 2
    assert_idle(engine)


def test_aborting_everything_leaves_the_engine_idle(engine: Engine) -> None:
    ids = [engine.add_request(prompt, EIGHT) for prompt in PROMPTS]
    engine.step()
    for request_id in ids:
        engine.abort(request_id)
    assert sorted(o.request_id for o in run(engine)) == sorted(ids)
    assert_idle(engine)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_step_that_fails_leaks_nothing_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = tokens(engine.generate(PROMPTS, EIGHT))
    ids = [engine.add_request(prompt, EIGHT) for prompt in PROMPTS]
    engine.step()

    def fail(*_: Any) -> Any:
        raise error("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model, "logits", fail)
        oom = error is torch.OutOfMemoryError
        with pytest.raises(UserError if oom else error, match="lower max_num_batched_tokens" if oom else "gone"):
            engine.step()
    final = {o.request_id: o for o in run(engine) if o.finished}
    assert [final[i].finish_reason for i in ids] == ["abort", "abort", "length", "length"]
    assert [final[i].token_ids for i in ids[2:]] == expected[2:]
    assert_idle(engine)
    assert tokens(engine.generate(PROMPTS, EIGHT)) == expected


def test_a_step_that_fails_in_generate_keeps_the_outputs_of_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine.add_request([2], SamplingParams(max_tokens=1))
    logits = engine.runner.model.logits
    calls: list[int] = []

    def fail_late(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")
        return logits(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model, "logits", fail_late)
        with pytest.raises(RuntimeError, match="late"):
            engine.generate(PROMPTS, EIGHT)
    assert [(o.request_id, o.finish_reason) for o in run(engine)] == [(other, "length")]
    assert_idle(engine)


def test_what_was_in_flight_when_a_step_failed_is_forgotten(engine: Engine) -> None:
    """A driver that plans ahead: a stale result must not be taken for that of the next step."""
    expected = tokens(engine.generate(PROMPTS, EIGHT))
    engine.add_request([9, 9], EIGHT)
    plan = engine.scheduler.plan()
    assert plan is not None
    engine.runner.submit(plan)
    engine.runner.forget()
    engine.scheduler.drop(plan)
    assert tokens(engine.generate(PROMPTS, EIGHT)) == expected


# -- figures ----------------------------------------------------------------------------------------------------------


def test_latencies_of_a_request_agree_with_one_another(engine: Engine) -> None:
    began = time.perf_counter()
    outputs = engine.generate(PROMPTS, EIGHT)
    took = time.perf_counter() - began
    for output in outputs:
        assert output.ttft and output.tpot and output.e2e and output.queue_time is not None
        assert 0 <= output.queue_time < output.ttft < output.e2e <= took
        assert len(output.itl) == 7 and min(output.itl) > 0
        assert output.tpot == pytest.approx(sum(output.itl) / 7)
        assert output.e2e == pytest.approx(output.ttft + sum(output.itl), abs=0.02)
    assert outputs[2].queue_time >= (outputs[0].e2e or 0) - 0.02, "the second batch waits for the first"
    (single,) = engine.generate([[1]], SamplingParams(max_tokens=1))
    assert single.itl == [] and single.tpot is None


def test_an_arrival_in_the_past_counts_as_queueing(engine: Engine) -> None:
    engine.add_request([1], EIGHT, arrival_time=time.perf_counter() - 5)
    first = engine.step()[0]
    assert first.e2e is None and first.ttft is not None and first.queue_time is not None
    assert first.ttft > first.queue_time >= 5


def test_an_output_never_changes_after_it_was_returned(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.tokenizer = tokenizer
    params = SamplingParams(max_tokens=6, logprobs=1)
    late = list(engine.stream([[5, 6]], params))  # looked into only now
    seen_live = [
        (o.text, list(o.token_ids), list(o.logprobs or []), len(o.itl), o.finish_reason, o.finished)
        for o in engine.stream([[5, 6]], params)
    ]
    assert [(o.text, o.token_ids, o.logprobs, len(o.itl), o.finish_reason, o.finished) for o in late] == seen_live
    assert [len(o.token_ids) for o in late] == [1, 2, 3, 4, 5, 6]


def test_metrics_count_and_reset(engine: Engine) -> None:
    engine.generate(PROMPTS, EIGHT)
    metrics = engine.metrics()
    assert (metrics["finished"], metrics["aborted"], metrics["output_tokens"]) == (4, 0, 32)
    assert metrics["steps"] == 16 and metrics["peak_running"] == 2
    assert isinstance(metrics["busy_time_s"], float) and metrics["busy_time_s"] > 0
    engine.reset_metrics()
    assert engine.metrics()["steps"] == engine.metrics()["output_tokens"] == 0
