"""The engine: requests in, tokens out, one step at a time. The same for all stages; a stage only brings the parts."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from common.admission import Admission
from common.config import EngineConfig
from common.errors import require
from common.execution.garbage import OldObjects
from common.kv_cache import PrefixCache
from common.memory import kv_bytes_per_token
from common.outputs import RequestOutput
from common.plan import StepPlan
from common.request import Request
from common.runner import Runner
from common.sampling_params import SamplingParams
from common.scheduler import Scheduler
from common.text.prompts import Prompt
from common.text.tokenizer import Tokenizer
from common.watch.metrics import EngineMetrics, Metrics, snapshot
from common.watch.progress import progress_bar
from common.watch.steps import StepWatch
from common.watch.trace import StepTrace

Params = SamplingParams | Sequence[SamplingParams] | None
"""One for all prompts, or one for each; None: `SamplingParams()` for all."""


class Engine:
    """*Plan → execute → update*, over and over. Not thread-safe: one thread drives an engine.

    Where the engine overlaps (`EngineConfig.overlap`), it plans and starts step N + 1 before it collects step N, so
    that the device always has the next step at hand. The tokens are the same; a token that was sampled after a
    request's last one is dropped. Stages before m2 do not overlap: a static batch has to know which requests ended.
    """

    def __init__(
        self,
        stage: str,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        max_model_len: int,
    ) -> None:
        self.stage = stage
        self.config = config
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.note: str | None = runner.model.note  # what a reader of its figures must know
        self.watch = StepWatch(scheduler)
        self._admission = Admission(config, scheduler, runner.model, tokenizer, max_model_len)
        self._numbers = itertools.count()  # of prompts
        self._requests: dict[str, list[Request]] = {}  # the samples of each prompt, by the caller's id
        self._undelivered: list[RequestOutput] = []
        self._planned: deque[StepPlan] = deque()  # started, not collected
        self._counts_on_device = runner.graphs is not None
        self._overlaps = config.overlaps and scheduler.plans_ahead
        self._prefix_cache = scheduler.cache if isinstance(scheduler.cache, PrefixCache) else None
        self._old_objects = OldObjects()
        self._closed = False

    # -- one request at a time --------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        cache_salt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Queue a prompt (text, token ids, or chat messages); returns the request's id.

        `priority`: lower is more urgent, under `scheduling_policy="priority"` (from m2 on).
        `arrival_time`: when it came, on `time.perf_counter()`'s clock (default: now).
        `cache_salt`: only requests with the same salt share cached beginnings (from m6 on), so that the time of a first
        token does not tell what others have asked.
        `chat_template_kwargs`: of chat messages, variables that the model's template knows, such as `enable_thinking`.
        Raises `UserError` for what can never run: an empty prompt, unknown token ids, more than max_model_len tokens.
        """
        require(not self._closed, "the engine is closed: build a new one")
        params = params or SamplingParams()
        number = next(self._numbers)
        request_id = request_id or f"request-{number}"
        require(request_id not in self._requests, f"request id {request_id!r} is in use: choose another")
        samples = self._admission.samples(
            prompt, self.tokenizer, params, number, request_id, priority, arrival_time, cache_salt, chat_template_kwargs
        )
        self._requests[request_id] = samples
        self.scheduler.add(samples[0], samples[1:])
        return request_id

    def compile_structure(self, params: SamplingParams, known: bool = False) -> object | None:
        """What these ask for, ahead of `add_request`, for which it is kept as long as the caller holds it; on any
        thread. `known`: only if it is there already, else None. Raises `UserError`."""
        return self._admission.structures.compiled(params, known)

    def abort(self, request_id: str) -> None:
        """End a request; its output, with finish_reason `abort`, comes with the next step. Unknown ids are ignored:
        the request may have finished while the caller decided."""
        for sample in self._requests.get(request_id, ()):
            self.scheduler.abort(sample)

    def step(self) -> list[RequestOutput]:
        """Finish one step; returns an output for each request that gained a token or ended."""
        self._old_objects.leave_alone(True)
        try:
            return self._deliver(self._step_ahead() if self._overlaps else self._step())
        except BaseException:
            self._drop_planned()
            raise
        finally:
            self._old_objects.leave_alone(self.has_unfinished)

    def _step(self) -> list[Request]:
        """The plain loop: plan, execute, update. Returns the requests that it touched."""
        plan = self._plan()
        if plan is None:
            return self.scheduler.take_ended()
        self._start(plan)
        return self._finish()

    def _step_ahead(self) -> list[Request]:
        """The same with the next step planned and started before this one is collected."""
        while len(self._planned) <= self._steps_ahead() and (plan := self._plan()) is not None:
            self._start(plan)
        return self._finish() if self._planned else self.scheduler.take_ended()

    def _steps_ahead(self) -> int:
        """0 where penalties need to know every token before, and it is not the device that counts them."""
        return int(self._counts_on_device or not any(request.penalised for request in self.scheduler.running))

    def _plan(self) -> StepPlan | None:
        """None: no request has anything to compute."""
        try:
            return self.scheduler.plan()
        except BaseException:
            self._drop_planned()
            self.scheduler.recover()
            raise

    def _start(self, plan: StepPlan) -> None:
        self._planned.append(plan)
        self.watch.planned(plan)
        self.runner.submit(plan)
        self.watch.started(plan)

    def _finish(self) -> list[Request]:
        """Wait for the oldest step that was started, and take its tokens."""
        tokens = self.runner.collect()
        plan = self._planned.popleft()
        self.watch.collected(plan, self.runner.device_time)
        for scores in self.runner.prompt_scores:
            scores.enter()
        touched = self.scheduler.update(plan, tokens)
        self.watch.metrics.output_tokens += self.scheduler.take_num_sampled()
        return touched

    def _drop_planned(self) -> None:
        """A step failed, or its results are not wanted any more."""
        while self._planned:
            self.scheduler.drop(self._planned.popleft())
        self.watch.forget()
        self.runner.forget()

    @property
    def has_unfinished(self) -> bool:
        """Is anything left to compute or to deliver?"""
        return self.scheduler.has_unfinished or bool(self._undelivered or self._planned)

    # -- many requests ----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], params: Params = None, *,
        cache_salt: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = False,
    ) -> list[RequestOutput]:  # fmt: skip
        """Run prompts to their ends; results in input order. `cache_salt`, ...: of all of them, as in `add_request`."""
        ids = self._add_all(prompts, params, cache_salt, chat_template_kwargs)
        finished: dict[str, RequestOutput] = {}
        with progress_bar("generating", len(ids), show=progress) as advance:
            for output in self._run(ids):
                if output.finished:
                    finished[output.request_id] = output
                    advance(1)
        return [finished[request_id] for request_id in ids]

    def stream(
        self, prompts: Sequence[Prompt], params: Params = None, *,
        cache_salt: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:  # fmt: skip
        """Like `generate`, yielding an output each time a request gains a token; `request_id`s count in input order.
        To stop reading early aborts what is left."""
        return self._run(self._add_all(prompts, params, cache_salt, chat_template_kwargs))

    def _add_all(
        self, prompts: Sequence[Prompt], params: Params, salt: str | None, template_kwargs: Mapping[str, Any] | None
    ) -> list[str]:
        require(not isinstance(prompts, str), "give a list of prompts: write [prompt]")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        counts = f"{len(prompts)} prompts but {len(each)} sampling params"
        require(len(each) == len(prompts), f"{counts}: give one, or one each")
        ids: list[str] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                ids.append(self.add_request(prompt, p, cache_salt=salt, chat_template_kwargs=template_kwargs))
        except BaseException:
            self._abandon(ids)
            raise
        return ids

    def _run(self, ids: Sequence[str]) -> Iterator[RequestOutput]:
        """Step until these requests have ended; outputs of other requests wait for the next `step()`."""
        open_ids = set(ids)
        try:
            while self._expects(open_ids):
                outputs = self.step()
                self._undelivered = [o for o in outputs if o.request_id not in open_ids]
                for output in [o for o in outputs if o.request_id in open_ids]:
                    if output.finished:
                        open_ids.discard(output.request_id)
                    yield output
        finally:
            self._abandon(list(open_ids))
            while self._planned:  # a call that returns leaves nothing behind
                self._undelivered += self._outputs(self._finish())

    def _expects(self, ids: set[str]) -> bool:
        """May any of these still bring an output? Not after `close()`, or if another caller's `step()` took it."""
        return not ids.isdisjoint(self._requests) or any(o.request_id in ids for o in self._undelivered)

    def _abandon(self, ids: Iterable[str]) -> None:
        """Abort requests whose outputs will not be read."""
        for request_id in ids:
            self.abort(request_id)
            self._requests.pop(request_id, None)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _deliver(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """What earlier steps could not hand over, and the outputs of these."""
        outputs, self._undelivered = self._undelivered + self._outputs(requests), []
        return outputs

    def _outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for output_id in dict.fromkeys([request.output_id for request in requests]):
            samples = self._requests.get(output_id)
            if samples is None:  # abandoned
                continue
            outputs.append(RequestOutput(samples))
            if outputs[-1].finished:
                del self._requests[output_id]
                self.watch.metrics.finished += 1
                self.watch.metrics.aborted += outputs[-1].finish_reason == "abort"
        return outputs

    @property
    def trace(self) -> StepTrace | None:
        """Set one to record the steps from now on."""
        return self.watch.trace

    @trace.setter
    def trace(self, trace: StepTrace | None) -> None:
        self.watch.trace = trace

    def metrics(self) -> Metrics:
        """What the engine does now, and what it has done since it was built or since `reset_metrics()`."""
        token_bytes = kv_bytes_per_token(self.runner.model.config, self.config.torch_dtype)
        return snapshot(self.stage, self.watch.metrics, self.scheduler, self.runner.attention, token_bytes)

    def reset_metrics(self) -> None:
        self.watch.metrics = EngineMetrics()
        if self._prefix_cache is not None:
            self._prefix_cache.reset_prefix_stats()

    def reset_prefix_cache(self) -> None:
        """Forget all cached beginnings (from m6 on); requests under way go on."""
        if self._prefix_cache is not None:
            self._prefix_cache.reset_prefix_cache()

    def close(self) -> None:
        """Abort what is left. Closing twice is no error."""
        self._abandon(list(self._requests))
        self._drop_planned()
        self._undelivered = []
        self._old_objects.leave_alone(False)
        self._closed = True
        if self.config.ranks is not None:
            self.config.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Build = Callable[[EngineConfig], Engine]  # A stage's way to build its engine
