"""Requests that wait for the tokens of others: when they come, with which prompt, and whose figures they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import worker
from benchmarks.contestant import OnTokens, Setting
from benchmarks.recipes import LONG, SHORT, STEADY, BenchRequest, Draw, chats, timed, warm
from benchmarks.record import Run, Timeline, record_runs
from benchmarks.stage_contestant import Arrivals, StageContestant
from benchmarks.worker import Job, run_job
from benchmarks.workloads import find_size
from common import Engine, SamplingParams
from common.errors import UserError


def test_the_clock_hands_out_in_order_of_time() -> None:
    arrivals = Arrivals([BenchRequest([1], 1, arrival=2.0), BenchRequest([2], 1, arrival=1.0)])
    assert arrivals.due(0.5) == []
    assert [(a.number, a.time) for a in arrivals.due(2.5)] == [(1, 1.0), (0, 2.0)]
    assert arrivals.left == 0


def test_a_trigger_waits_for_the_slowest_of_the_steady() -> None:
    steady = [BenchRequest([1], 9, group=STEADY)] * 2
    arrivals = Arrivals([*steady, BenchRequest([2], 1, group=SHORT, after_tokens=2)])
    assert [a.number for a in arrivals.due(0.0)] == [0, 1]
    arrivals.gained([0], 1.0)
    arrivals.gained([0, 1], 2.0)
    assert arrivals.due(2.0) == []
    arrivals.gained([1], 3.0)
    assert [(a.number, a.time) for a in arrivals.due(3.0)] == [(2, 3.0)]


def test_a_turn_begins_with_what_was_said_and_comes_when_its_reader_has_thought() -> None:
    arrivals = Arrivals([BenchRequest([1, 2, 3], 2), BenchRequest([9], 1, arrival=0.5, follows=0, keep=4)])
    arrivals.due(0.0)
    arrivals.ended(0, [1, 2, 3, 7, 8], at=2.0)
    assert arrivals.due(2.4) == []
    (turn,) = arrivals.due(2.5)
    assert turn.prompt == [1, 2, 3, 7, 9]
    assert turn.time == 2.5


def test_a_trigger_that_never_comes_is_an_error_and_no_endless_wait() -> None:
    arrivals = Arrivals([BenchRequest([1], 1, after_tokens=5)])
    with pytest.raises(RuntimeError, match="1 requests wait for tokens that no request makes"):
        arrivals.check_idle()


def contestant(stage: str, workload: str) -> StageContestant:
    size = find_size(workload, None, "quick")
    return StageContestant(stage, Setting.of("random:tiny-llama", "fp32", "cpu", size, {}))


@pytest.mark.parametrize("stage", ["m1", "m2", "m3", "m4"])
def test_long_prompts_come_between_the_tokens_of_the_steady_ones(stage: str) -> None:
    requests = find_size("interference", None, "quick").requests(512, run=1)
    runner = contestant(stage, "interference")
    try:
        run = runner.run(requests, lambda tokens: None)
    finally:
        runner.close()
    worker.check_lengths(requests, run)
    assert run.metrics.get("preemptions") in (0, None)
    for request, timeline in zip(requests, run.timelines, strict=True):
        if request.after_tokens is not None:
            made = [
                sum(moment <= timeline.arrival for moment in other.token_times)
                for other, r in zip(run.timelines, requests, strict=True)
                if r.group == STEADY
            ]
            assert min(made) == request.after_tokens
    record = record_runs(stage, "interference", requests, [run])
    assert list(record.ttft_by_group or {}) == [STEADY, LONG, SHORT]


def test_a_stage_takes_those_of_the_workloads_options_that_it_has() -> None:
    with_budget, without = contestant("m2", "interference"), contestant("m1", "interference")
    try:
        assert with_budget.engine.config.max_num_batched_tokens == 128
        assert without.engine.config.max_num_batched_tokens == 2048, "m1 has no such option: the default"
    finally:
        with_budget.close()
        without.close()


@pytest.mark.parametrize("variant", [None, "hit_rate=50"])
def test_each_turns_prompt_is_what_its_chat_has_said(variant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    size = find_size("multi_turn", variant, "quick")
    requests = timed(size.requests(512, run=1))
    seen: list[list[int]] = []
    add = Engine.add_request

    def spy(self: Engine, prompt: Any, *args: Any, **kwargs: Any) -> str:
        seen.append(list(prompt))
        return add(self, prompt, *args, **kwargs)

    monkeypatch.setattr(Engine, "add_request", spy)
    runner = contestant("m3", "multi_turn")
    try:
        run = runner.run(requests, lambda tokens: None)
        worker.check_lengths(requests, run)
        prompts = [next(p for p in seen if p[-len(r.prompt) :] == r.prompt) for r in requests]
        assert [len(prompt) for prompt in prompts] == [r.prompt_length for r in requests]
        for index, (request, timeline) in enumerate(zip(requests, run.timelines, strict=True)):
            if request.follows is not None:
                before = requests[request.follows]
                params = SamplingParams(max_tokens=before.max_tokens, ignore_eos=True)
                said = (
                    prompts[request.follows] + runner.engine.generate([prompts[request.follows]], params)[0].token_ids
                )
                assert prompts[index] == said[: request.keep] + request.prompt
                assert (request.keep == len(said)) == (variant is None)
                ended = run.timelines[request.follows].token_times[-1]
                assert timeline.arrival == pytest.approx(ended + request.arrival)
    finally:
        runner.close()


@pytest.mark.parametrize("workload", ["shared_prefix", "multi_turn"])
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_prompts_share_what_the_hit_rate_says_and_lengths_do_not_depend_on_it(workload: str, preset: str) -> None:
    lengths: list[list[tuple[int, int, float]]] = []
    for variant in (None, "hit_rate=0", "hit_rate=50", "hit_rate=80"):
        size = find_size(workload, variant, preset)
        everything = size.requests(49152, run=1)
        beginning = warm(everything)[0].prompt if warm(everything) else []
        known = 0
        for request in timed(everything):
            own = 0
            while own < len(beginning) and request.prompt[own : own + 1] == beginning[own : own + 1]:
                own += 1
            known += own if request.follows is None else request.keep
        total = sum(r.prompt_length for r in timed(everything))
        assert size.hit_rate is not None
        assert known / total == pytest.approx(size.hit_rate / 100, abs=0.01)
        lengths.append([(r.prompt_length, r.max_tokens, r.arrival) for r in timed(everything)])
    assert all(other == lengths[0] for other in lengths)


def test_every_run_has_a_beginning_of_its_own() -> None:
    size = find_size("shared_prefix", None, "cpu")
    first, second = (warm(size.requests(49152, run=run))[0] for run in (1, 2))
    assert first.prompt[:16] != second.prompt[:16]


def test_without_hits_nothing_is_warmed() -> None:
    assert warm(chats(2, 1, 64, (4, 6), (2, 3), 1.0, share=0.0)(Draw(512))) == []


class Fake:
    """Makes a token a second, and remembers what it was given."""

    vocab_size = 512
    note = None

    def __init__(self) -> None:
        self.runs: list[list[BenchRequest]] = []

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        self.runs.append(list(requests))
        counters = {"prefix_hit_rate": 0.95, "tokens_saved": 7, "blocks_shared": 3, "evictions": 1}
        return Run(0.0, [Timeline(0.0, [1.0 + i for i in range(r.max_tokens)]) for r in requests], counters)

    def attention_clock(self) -> None:
        return None

    def close(self) -> None:
        pass


def test_the_beginning_runs_before_the_clock_starts_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(worker, "build_contestant", lambda job, setting: fake)
    record = run_job(Job("m6", "shared_prefix", "quick", "random:tiny-llama", "fp32", "cpu", repeats=2))
    assert [len(requests) for requests in fake.runs] == [2, 1, 4, 1, 4], "warm-up, then twice: beginning, questions"
    for beginning, questions in (fake.runs[1:3], fake.runs[3:5]):
        (shared,) = beginning
        assert len(shared.prompt) == 96
        assert all(question.prompt[:96] == shared.prompt for question in questions)
    assert fake.runs[1][0].prompt != fake.runs[3][0].prompt
    assert (record.prefix_hit_rate, record.tokens_saved, record.blocks_shared, record.evictions) == (0.95, 7, 3, 1)
    assert record.output_tokens_per_s == pytest.approx(sum(r.max_tokens for r in fake.runs[2]) / 3)


def test_peers_say_that_they_cannot_follow_the_tokens_of_a_run() -> None:
    with pytest.raises(UserError, match="not applicable: interference follows the tokens of a run"):
        run_job(Job("llama.cpp Q4_0", "interference", "quick", "random:tiny-llama", "fp32", "cpu", repeats=1))
