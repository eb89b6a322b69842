"""The engine: requests in, tokens out, one step at a time. The same for all stages; a stage only brings the parts."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from types import TracebackType
from typing import Self

from common.attention import description
from common.config import EngineConfig
from common.errors import require
from common.in_flight import StepInFlight
from common.kv_cache import PrefixCache
from common.memory import kv_bytes_per_token
from common.outputs import RequestOutput
from common.request import Request
from common.runner import Runner
from common.sampler import mix
from common.sampling_params import SamplingParams
from common.scheduler import Scheduler
from common.text.detokenizer import Detokenizer
from common.text.prompts import Prompt, encode_prompt
from common.text.tokenizer import Tokenizer
from common.watch.metrics import EngineMetrics
from common.watch.progress import progress_bar
from common.watch.trace import StepTrace


class Engine:
    """*plan → submit → collect → update*, over and over. Not thread-safe: one thread drives an engine.

    Where the engine overlaps (`EngineConfig.overlap`), it plans and submits step N + 1 before it collects step N, so
    that the device always has the next step at hand. The tokens are the same. What a request samples after its last
    token, because nobody knew yet that it was the last, is dropped. Stages before m2 do not overlap: a static batch
    has to know who has ended.
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
        self.trace: StepTrace | None = None  # set one to record the steps from now on
        self._requests: dict[str, list[Request]] = {}  # the samples of each prompt, by the caller's id
        self._undelivered: list[RequestOutput] = []
        self._in_flight: deque[StepInFlight] = deque()
        self._overlaps = config.overlaps and scheduler.plans_ahead
        self._last_end = 0.0  # when a step was collected last
        self._counter = itertools.count()
        self._sample_counter = itertools.count()
        self._metrics = EngineMetrics()
        self._prefix_cache = scheduler.cache if isinstance(scheduler.cache, PrefixCache) else None
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
    ) -> str:
        """Queue a prompt (text, token ids, or chat messages); returns the request's id.

        `priority`: lower is more urgent, under `scheduling_policy="priority"` (from m2 on).
        `arrival_time`: when it came, on `time.perf_counter()`'s clock (default: now).
        `cache_salt`: only requests with the same salt share cached beginnings (from m6 on; before, nobody shares), so
        that nobody learns from the time of a first token what somebody else has asked.
        Raises `UserError` for whatever can never run: an empty prompt, token ids outside of the vocabulary, prompt +
        max_tokens over max_model_len.
        """
        require(not self._closed, "the engine is closed: build a new one")
        params = params or SamplingParams()
        number = next(self._counter)
        request_id = request_id or f"request-{number}"
        require(request_id not in self._requests, f"request id {request_id!r} is in use: choose another")
        require(
            isinstance(priority, int)
            and isinstance(arrival_time or 0.0, int | float)
            and isfinite(arrival_time or 0.0),
            f"priority is a whole number and arrival_time a time in seconds, not {priority!r} and {arrival_time!r}",
        )
        require(
            cache_salt is None or (isinstance(cache_salt, str) and bool(cache_salt)),
            f"cache_salt is a text that is not empty, or None, not {cache_salt!r}",
        )
        token_ids = encode_prompt(prompt, self.tokenizer, self.runner.model.config.vocab_size)
        total = len(token_ids) + params.max_tokens
        require(
            total <= self.max_model_len,
            f"the prompt has {len(token_ids)} tokens; with max_tokens={params.max_tokens} that is {total}, over "
            f"max_model_len={self.max_model_len}: shorten the prompt or lower max_tokens",
        )
        require(
            not params.stop_strings or self.tokenizer is not None,
            "stop strings need a tokenizer, and this model has none: use stop_token_ids",
        )
        require(
            params.n <= self.scheduler.max_num_seqs,
            f"n={params.n} samples run together, over max_num_seqs={self.scheduler.max_num_seqs}: lower n",
        )
        require(
            self.scheduler.cache.fits(total, params.n),
            f"prompt and output, {total} tokens, are more than the whole KV cache holds: raise kv_cache_memory, "
            "shorten the prompt, or lower max_tokens or n",
        )
        seed = params.seed if params.seed is not None else mix(self.config.seed, number)
        samples = [
            Request(
                id=request_id if index == 0 else f"{request_id}#{index}",
                output_id=request_id,
                number=next(self._sample_counter),
                prompt_token_ids=token_ids,
                params=params,
                eos_token_ids=frozenset(self.runner.model.config.eos_token_ids),
                seed=seed if index == 0 else mix(seed, -1 - index),
                arrival_time=time.perf_counter() if arrival_time is None else arrival_time,
                priority=priority,
                prompt=prompt if isinstance(prompt, str) else None,
                cache_salt=cache_salt,
                detokenizer=self._detokenizer(len(token_ids), params),
            )
            for index in range(params.n)
        ]
        self._requests[request_id] = samples
        self.scheduler.add(samples[0], samples[1:])
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request; its output, with finish_reason `abort`, comes with the next step. Unknown ids are ignored:
        the request may have finished while the caller decided."""
        for sample in self._requests.get(request_id, ()):
            self.scheduler.abort(sample)

    def step(self) -> list[RequestOutput]:
        """Finish one step; returns an output for each request that gained a token or ended."""
        try:
            while len(self._in_flight) <= self._steps_ahead() and self._submit_next():
                pass
            return self._deliver(self._collect() if self._in_flight else self.scheduler.take_ended())
        except BaseException:
            self._drop_in_flight()
            raise

    def _submit_next(self) -> bool:
        """Plan a step and start it; False: nobody has anything to compute."""
        try:
            plan = self.scheduler.plan()
        except BaseException:
            self._drop_in_flight()
            self.scheduler.recover()
            raise
        if plan is None:
            return False
        step = StepInFlight(plan, self.scheduler, time.perf_counter() - plan.planned_at)
        self._in_flight.append(step)
        if self.trace is not None:
            step.record = self.trace.open(plan, self.scheduler.cache, step.queues)
        self.runner.submit(plan)
        step.host_time = time.perf_counter() - plan.planned_at
        return True

    def _collect(self) -> list[Request]:
        """Wait for the oldest step in flight and take its tokens."""
        tokens = self.runner.collect()
        step = self._in_flight.popleft()
        begin, self._last_end = max(step.plan.planned_at, self._last_end), time.perf_counter()
        self._metrics.plan_time += step.plan_time
        self._metrics.host_time += step.host_time
        self._metrics.record_step(step.plan, step.usage, step.queues.running, self._last_end - begin)
        if self.trace is not None and step.record is not None:
            self.trace.close(step.record, step.plan, begin, self._last_end, step.host_time, self.runner.device_time)
        touched = self.scheduler.update(step.plan, tokens)
        self._metrics.output_tokens += self.scheduler.take_num_sampled()
        return touched

    def _steps_ahead(self) -> int:
        """How many steps may be in flight while the next one is planned: one, or none where penalties need to know
        every token before."""
        return int(self._overlaps and not any(request.penalised for request in self.scheduler.running))

    def _drop_in_flight(self) -> None:
        """A step failed, or nobody wants it any more."""
        while self._in_flight:
            self.scheduler.drop(self._in_flight.popleft().plan)
        self.runner.forget()

    @property
    def has_unfinished(self) -> bool:
        """Is anything left to compute or to deliver?"""
        return self.scheduler.has_unfinished or bool(self._undelivered or self._in_flight)

    # -- many requests ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
        progress: bool | None = False,
    ) -> list[RequestOutput]:
        """Run prompts to their ends; results in input order. `params`: one for all, or one for each. `cache_salt`: of
        all of them, as in `add_request`."""
        ids = self._add_all(prompts, params, cache_salt)
        finished: dict[str, RequestOutput] = {}
        with progress_bar("generating", len(ids), show=progress) as advance:
            for output in self._run(ids):
                if output.finished:
                    finished[output.request_id] = output
                    advance(1)
        return [finished[request_id] for request_id in ids]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, yielding an output each time a request gains a token; `request_id`s count in input order.
        Whoever stops reading early aborts what is left."""
        return self._run(self._add_all(prompts, params, cache_salt))

    def _add_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None,
    ) -> list[str]:
        require(not isinstance(prompts, str), "give a list of prompts: write [prompt]")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        require(
            len(each) == len(prompts), f"{len(prompts)} prompts but {len(each)} sampling params: give one, or one each"
        )
        ids: list[str] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                ids.append(self.add_request(prompt, p, cache_salt=cache_salt))
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
            while self._in_flight:  # a call that returns leaves nothing behind
                self._undelivered += self._outputs(self._collect())

    def _expects(self, ids: set[str]) -> bool:
        """May any of these still bring an output? Not after `close()`, or if another caller's `step()` took it."""
        return not ids.isdisjoint(self._requests) or any(o.request_id in ids for o in self._undelivered)

    def _abandon(self, ids: Iterable[str]) -> None:
        """Abort requests whose outputs nobody will read."""
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
                self._metrics.finished += 1
                self._metrics.aborted += outputs[-1].finish_reason == "abort"
        return outputs

    def _detokenizer(self, num_prompt_tokens: int, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer.backend, num_prompt_tokens, params.stop_strings, params.min_tokens)

    def metrics(self) -> dict[str, float | int | str | None]:
        """What the engine does now, and what it has done since it was built or since `reset_metrics()`."""
        m = self._metrics
        usage = self.scheduler.cache.usage()
        token_bytes = kv_bytes_per_token(self.runner.model.config, self.config.torch_dtype)
        return {
            "stage": self.stage,
            "attention": description(self.runner.attention),
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "swapped": len(self.scheduler.swapped),
            "steps": m.steps,
            "busy_time_s": m.busy_time,
            "plan_time_s": m.plan_time,
            "host_time_s": m.host_time,
            "computed_tokens": m.computed_tokens,
            "padded_tokens": m.padded_tokens,
            "padding_share": m.padding_share,
            "output_tokens": m.output_tokens,
            "finished": m.finished,
            "aborted": m.aborted,
            "peak_running": m.peak_running,
            "preemptions": m.preemptions,
            "swaps": m.swaps,
            "kv_blocks_used": usage.blocks,
            "kv_pool_bytes": self.runner.attention.kv_bytes(),
            "kv_reserved_bytes": usage.reserved * token_bytes,
            "kv_used_bytes": usage.stored * token_bytes,
            "kv_reserved_peak_bytes": m.kv_peak_reserved * token_bytes,
            "kv_used_peak_bytes": m.kv_peak_stored * token_bytes,
            "kv_utilization": m.kv_utilization,
            **self._prefix_metrics(),
        }

    def _prefix_metrics(self) -> dict[str, float | int | str | None]:
        """The same names for all stages; None where there is no prefix cache."""
        stats = self._prefix_cache.prefix_stats() if self._prefix_cache is not None else None
        return {
            "prefix_hit_rate": stats and stats.hit_rate,
            "tokens_saved": stats and stats.saved,
            "tokens_recovered": stats and stats.recovered,
            "blocks_shared": stats and stats.blocks,
            "blocks_shared_now": stats and stats.shared,
            "blocks_shared_peak": stats and stats.peak_shared,
            "blocks_cached": stats and stats.cached,
            "evictions": stats and stats.evictions,
        }

    def reset_metrics(self) -> None:
        self._metrics = EngineMetrics()
        if self._prefix_cache is not None:
            self._prefix_cache.reset_prefix_stats()

    def reset_prefix_cache(self) -> None:
        """Forget all cached beginnings, as if nothing had run before; requests under way go on. Before m6 there are
        none to forget."""
        if self._prefix_cache is not None:
            self._prefix_cache.reset_prefix_cache()

    def close(self) -> None:
        """Abort what is left. Closing twice is no error."""
        self._abandon(list(self._requests))
        self._drop_in_flight()
        self._undelivered = []
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
