"""The part that every scheduler shares, driven as a loop does that plans one step ahead of the results."""

from __future__ import annotations

from collections.abc import Sequence

from common import SamplingParams
from common.plan import StepPlan
from common.request import Request, SampledToken
from common.scheduler import Scheduler
from common.watch.kv_memory import KVUsage

EOS = 9


class RecordingCache:
    """Has room for all, and remembers who was freed."""

    def __init__(self) -> None:
        self.freed: list[str] = []

    def fits(self, num_tokens: int, samples: int) -> bool:
        return True

    def can_admit(self, request: Request) -> bool:
        return True

    def grow(self, request: Request, upto: int) -> bool:
        return True

    def mark_computed(self, request: Request, upto: int) -> None:
        request.num_computed_tokens = upto

    def block_table(self, request: Request) -> Sequence[int]:
        return ()

    def free(self, request: Request) -> None:
        self.freed.append(request.id)

    def usage(self) -> KVUsage:
        return KVUsage()


class EveryoneRuns(Scheduler):
    """The simplest policy: all that wait start, and all that run get a chunk of all that is not computed."""

    def plan(self) -> StepPlan | None:
        while self.waiting:
            self._start(self.waiting[0])
        if not self.running:
            return None
        return StepPlan([self._chunk(r, r.num_tokens - r.num_computed_tokens) for r in self.running])


def scheduler_with(*prompts: list[int], max_tokens: int = 8) -> tuple[EveryoneRuns, RecordingCache, list[Request]]:
    cache = RecordingCache()
    scheduler = EveryoneRuns(cache, max_num_seqs=8)
    params = SamplingParams(max_tokens=max_tokens)
    requests = [
        Request(f"r{n}", prompt, params, frozenset([EOS]), 0, 0.0, number=n) for n, prompt in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    return scheduler, cache, requests


def plan(scheduler: Scheduler) -> StepPlan:
    result = scheduler.plan()
    assert result is not None
    return result


def token(*requests: Request, token_id: int = 1) -> dict[str, SampledToken]:
    return {request.id: SampledToken(token_id) for request in requests}


def test_a_step_is_planned_while_its_input_token_is_still_in_flight() -> None:
    scheduler, _, (request,) = scheduler_with([1, 2, 3])
    first, second = plan(scheduler), plan(scheduler)
    assert [(c.start, c.length, c.samples) for c in first.chunks + second.chunks] == [(0, 3, True), (3, 1, True)]
    assert (request.num_open_chunks, request.num_unseen_tokens, request.num_tokens) == (2, 2, 5)
    assert request.token_ids[request.num_prompt_tokens :] == []
    assert scheduler.update(first, token(request, token_id=4)) == [request]
    assert second.chunks[0].token_ids() == [4]
    scheduler.update(second, token(request, token_id=5))
    assert request.token_ids[request.num_prompt_tokens :] == [4, 5]
    assert (request.num_open_chunks, request.num_unseen_tokens, request.num_tokens) == (0, 0, 5)


def test_a_request_that_ended_a_step_ago_keeps_its_memory_until_that_step_is_back() -> None:
    for max_tokens, last in ((8, EOS), (1, 4)):
        scheduler, cache, (request, other) = scheduler_with([1, 2], [3], max_tokens=max_tokens)
        if max_tokens == 1:
            other.params, other.max_num_tokens = SamplingParams(max_tokens=8), 9
        first, second = plan(scheduler), plan(scheduler)
        scheduler.update(first, token(request, token_id=last) | token(other))
        assert request.finished and cache.freed == []
        third = plan(scheduler)
        assert [c.request for c in third.chunks] == [other]
        touched = scheduler.update(second, token(request, other))
        assert touched == [other], "the surplus token is not reported"
        assert cache.freed == [request.id]
        assert request.token_ids[request.num_prompt_tokens :] == [last]
        assert request.num_tokens == 3 and request.num_unseen_tokens == 0
        scheduler.update(third, token(other))
        assert cache.freed == [request.id] and other.token_ids[other.num_prompt_tokens :] == [1, 1, 1]


def test_an_aborted_request_keeps_its_memory_until_its_last_step_is_back() -> None:
    """Must not be freed while it is in flight."""
    scheduler, cache, (request, other) = scheduler_with([1, 2], [3])
    first, second = plan(scheduler), plan(scheduler)
    scheduler.abort(request)
    assert not request.finished and cache.freed == []
    touched = scheduler.update(first, token(request, other))
    assert touched.count(request) == 1 and request.finish_reason == "abort"
    assert cache.freed == [] and request not in scheduler.running
    assert scheduler.update(second, token(request, other)) == [other]
    assert cache.freed == [request.id]
    assert request.token_ids[request.num_prompt_tokens :] == [], "what comes after the abort is not the caller's"


def test_an_abort_between_steps_or_in_the_queue_is_at_once_and_reported_once() -> None:
    scheduler, cache, (request, other) = scheduler_with([1, 2], [3])
    scheduler.abort(other)
    first = plan(scheduler)
    assert [c.request for c in first.chunks] == [request]
    assert scheduler.update(first, token(request)) == [other, request]
    scheduler.abort(request)
    scheduler.abort(request)
    assert cache.freed == [other.id, request.id]
    assert scheduler.has_unfinished and scheduler.plan() is None
    assert scheduler.take_ended() == [request] and scheduler.take_ended() == []
    assert not scheduler.has_unfinished


def test_a_prefill_chunk_that_does_not_reach_the_end_samples_nothing() -> None:
    scheduler, _, (request,) = scheduler_with([1, 2, 3, 4, 5])
    scheduler._start(request)
    part = scheduler._chunk(request, 3)
    assert not part.samples and part.kind == "prefill" and part.token_ids() == [1, 2, 3]
    assert request.num_unseen_tokens == 0
    assert scheduler.update(StepPlan([part]), {}) == []
    rest = scheduler._chunk(request, 2)
    assert rest.samples and (rest.start, rest.end) == (3, 5)


def test_an_abort_during_a_chunk_that_samples_nothing_is_reported() -> None:
    scheduler, cache, (request,) = scheduler_with([1, 2, 3])
    scheduler._start(request)
    part = StepPlan([scheduler._chunk(request, 2)])
    scheduler.abort(request)
    assert scheduler.update(part, {}) == [request]
    assert cache.freed == [request.id]


def test_a_dropped_step_ends_its_requests_and_frees_them_once() -> None:
    scheduler, cache, (request, other) = scheduler_with([1, 2], [3])
    scheduler.drop(plan(scheduler))
    assert cache.freed == [request.id, other.id]
    assert scheduler.take_ended() == [request, other]
    assert {r.finish_reason for r in (request, other)} == {"abort"}
    assert request.num_open_chunks == request.num_unseen_tokens == 0 and request.num_tokens == 2
    assert not scheduler.has_unfinished


def test_times_are_set_once_and_in_order() -> None:
    scheduler, _, (request,) = scheduler_with([1], max_tokens=2)
    first = plan(scheduler)
    started = request.scheduled_time
    scheduler.update(first, token(request))
    scheduler.update(plan(scheduler), token(request))
    assert request.scheduled_time == started and started is not None and request.finish_time is not None
    assert started <= request.token_times[0] <= request.token_times[1] <= request.finish_time
