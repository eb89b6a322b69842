"""Checks that every stage from m2 on has to pass. A new stage joins by its name in these lists."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from common import Engine, RequestOutput, SamplingParams
from common.plan import StepPlan
from common.queue import AGEING_SECONDS
from common.request import Request, RequestStatus
from tests.depth import DEEP
from tests.fake_runner import EOS, expected_output

CONTINUOUS = ("m2", "m3", "m4", "m5", "m6", "m7")
"""Stages that schedule by iteration."""
PAGED = ("m3", "m4", "m5", "m6", "m7")
"""Stages whose KV cache is paged."""
UNMIXED = ("m2", "m3", "m4")
"""Stages with prefill steps and decode steps apart."""
CHUNKED = ("m5", "m6", "m7")
"""Stages that compute prompts in chunks, together with decodes."""
SHARING = ("m6", "m7")
"""Stages that find cached beginnings."""
BOOKKEEPING = CONTINUOUS if DEEP else ("m2", "m3", "m5", "m6")
"""Stages whose scheduler or cache is their own: m4 has m3's, m7 has m6's, which `test_schedulers.py` makes sure of."""

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Bytes of a token's K and V in the tiny models: K and V, layers, KV heads, head dimension, float32."""


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(1, 512) for _ in range(length)] for length in lengths]


def exactly(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def set_eos(engine: Engine, *ids: int) -> None:
    engine.runner.model.config = replace(engine.runner.model.config, eos_token_ids=ids)


# -- invariants -------------------------------------------------------------------------------------------------------


def check(engine: Engine) -> None:
    """The cache is sound, the queues are disjoint and say what the requests say, and only who runs holds memory."""
    scheduler, cache = engine.scheduler, engine.scheduler.cache
    cache.check_integrity()
    queues = {
        RequestStatus.WAITING: list(scheduler.waiting),
        RequestStatus.RUNNING: scheduler.running,
        RequestStatus.SWAPPED: list(scheduler.swapped),
    }
    queued = [request.id for queue in queues.values() for request in queue]
    assert len(set(queued)) == len(queued), "a request is in two queues"
    for status, queue in queues.items():
        assert all(request.status is status for request in queue), f"{status} is not what its queue says"
    assert len(scheduler.running) <= scheduler.max_num_seqs
    regions, usage = cache.regions(), cache.usage()
    held = sum(region.length for region in regions)
    assert held == usage.reserved <= usage.capacity, f"{held} slots held, {usage}"
    assert sum(region.stored for region in regions) == usage.stored
    running = {request.id for request in scheduler.running}
    known = {request.id: request for samples in engine._requests.values() for request in samples}
    for id in {id for region in regions for id in region.owners} - running:
        assert id not in known or known[id].num_open_chunks > 0, f"{id} does not run and holds memory"


def assert_empty(engine: Engine) -> None:
    """All are accounted for, and the pool is empty."""
    metrics = engine.metrics()
    left = [metrics[name] for name in ("waiting", "running", "swapped", "kv_reserved_bytes", "kv_used_bytes")]
    assert left == [0, 0, 0, 0, 0] and not engine.has_unfinished and not engine._requests
    cpu_pool = getattr(engine.scheduler.cache, "cpu_pool", None)
    assert cpu_pool is None or cpu_pool.num_free == cpu_pool.num_blocks
    engine.scheduler.cache.check_integrity()


def serve(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    aborts: Mapping[int, Sequence[int]] | None = None,
) -> list[RequestOutput]:
    """Run prompts to their ends, `check` after every step. `aborts`: after step s, requests (by index) to end.
    Returns the last output of each; everybody must have one."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [engine.add_request(list(prompt), p) for prompt, p in zip(prompts, each, strict=True)]
    final: dict[str, RequestOutput] = {}
    most = sum(len(prompt) + p.max_tokens * p.n for prompt, p in zip(prompts, each, strict=True)) + 1
    for step in range(most):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            assert not (output.request_id in final and final[output.request_id].finished), "an output after the end"
            final[output.request_id] = output
        check(engine)
        for index in (aborts or {}).get(step, ()):
            engine.abort(ids[index])
            check(engine)
    assert not engine.has_unfinished, f"not done after {most} steps: a livelock"
    assert_empty(engine)
    assert set(final) == set(ids) and all(output.finished for output in final.values())
    return [final[id] for id in ids]


# -- without a model --------------------------------------------------------------------------------------------------


class Driver:
    """Steps an engine `without_model` by hand and holds every plan against the policy.

    `ahead`: plan one step before the tokens of the last one are known, as a loop does that keeps a GPU busy.
    """

    def __init__(self, engine: Engine, ahead: bool = False) -> None:
        set_eos(engine, EOS)
        self.engine, self.scheduler = engine, engine.scheduler
        self.requests: list[Request] = []
        self._depth = int(ahead)
        self._in_flight: deque[StepPlan] = deque()

    def add(self, prompt: list[int], params: SamplingParams, priority: int = 0, arrival: float = 0.0) -> list[Request]:
        """The samples of a new request; `UserError` if it can never run."""
        id = self.engine.add_request(prompt, params, priority=priority, arrival_time=arrival)
        samples = self.engine._requests[id]
        self.requests += samples
        return samples

    def step(self) -> StepPlan | None:
        """Plan a step, and finish the oldest one in flight."""
        waiting = list(self.scheduler.waiting)
        plan = self.scheduler.plan()
        if plan is not None:
            self._check_plan(plan, waiting)
            self.engine.runner.submit(plan)
            self._in_flight.append(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > self._depth):
            touched = self.scheduler.update(self._in_flight.popleft(), self.engine.runner.collect())
        else:
            touched = self.scheduler.take_ended()
        self.engine._deliver(touched)
        check(self.engine)
        if self.scheduler.waiting.policy == "fcfs":
            self._check_first_tokens()
        return plan

    def drain(self) -> None:
        """Everybody finishes, within as many steps as there are tokens, with the tokens that are theirs."""
        most = sum(r.num_prompt_tokens + r.params.max_tokens for r in self.requests) + 2
        for _ in range(most):
            if not self.scheduler.has_unfinished and not self._in_flight:
                break
            self.step()
        assert not self.scheduler.has_unfinished, f"not done after {most} steps: a livelock"
        assert_empty(self.engine)
        for request in self.requests:
            p = request.params
            expected = expected_output(request.seed, request.num_prompt_tokens, p.max_tokens, p.ignore_eos)
            got = tuple(request.token_ids[request.num_prompt_tokens :])
            assert request.finished and request.num_open_chunks == request.num_unseen_tokens == 0
            if request.finish_reason == "abort":
                assert got == expected[: len(got)]
            else:
                assert got == expected, f"{request.id} got {got} instead of {expected}"

    def urgency(self, request: Request) -> tuple[float, int]:
        """The stated policy, written down a second time: `AGEING_SECONDS` of waiting are worth one level."""
        if self.engine.config.scheduling_policy == "fcfs":
            return (0, request.number)
        return (request.priority * AGEING_SECONDS + request.arrival_time, request.number)

    def _check_plan(self, plan: StepPlan, waited: list[Request]) -> None:
        assert plan.chunks, "a step that computes nothing"
        waits = {request.id for request in self.scheduler.waiting}
        started = [self.urgency(r) for r in waited if r.id not in waits]
        passed_over = [self.urgency(r) for r in waited if r.id in waits and r not in plan.preempted]
        assert not started or not passed_over or max(started) < min(passed_over), "a request jumped the queue"
        decoded = [self.urgency(c.request) for c in plan.chunks if c.kind == "decode"]
        preempted = [self.urgency(r) for r in plan.preempted]
        assert not decoded or not preempted or max(decoded) < min(preempted), "the wrong one was preempted"

    def _check_first_tokens(self) -> None:
        """Under fcfs no request has a token while one that came earlier has none."""
        begun = [bool(r.token_times) for r in self.requests if r.finish_reason != "abort"]
        assert begun == sorted(begun, reverse=True), "first tokens out of order"
