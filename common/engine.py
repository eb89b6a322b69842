"""The engine: requests in, tokens out, one step at a time. The same for all stages; a stage only brings the parts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from common.config import EngineConfig
from common.detokenizer import Detokenizer
from common.memory import kv_bytes_per_token
from common.metrics import EngineMetrics
from common.options import require
from common.outputs import RequestOutput
from common.progress import progress_bar
from common.prompts import Prompt, encode_prompt
from common.request import Request
from common.runner import Runner
from common.sampler import mix
from common.sampling_params import SamplingParams
from common.scheduler import Scheduler
from common.tokenizer import Tokenizer


class Engine:
    """*plan → execute → update*, over and over. Not thread-safe: one thread drives an engine."""

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
        self._requests: dict[str, Request] = {}
        self._undelivered: list[RequestOutput] = []
        self._counter = itertools.count()
        self._metrics = EngineMetrics()
        self._closed = False

    # -- one request at a time --------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> str:
        """Queue a prompt (text, token ids, or chat messages); returns the request's id.

        `arrival_time`: when it came, on `time.perf_counter()`'s clock (default: now). Raises `UserError` for whatever
        can never run: an empty prompt, token ids outside of the vocabulary, prompt + max_tokens over max_model_len.
        """
        require(not self._closed, "the engine is closed: build a new one")
        params = params or SamplingParams()
        number = next(self._counter)
        request_id = request_id or f"request-{number}"
        require(request_id not in self._requests, f"request id {request_id!r} is in use: choose another")
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
        request = Request(
            id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=frozenset(self.runner.model.config.eos_token_ids),
            seed=params.seed if params.seed is not None else mix(self.config.seed, number),
            arrival_time=time.perf_counter() if arrival_time is None else arrival_time,
            prompt=prompt if isinstance(prompt, str) else None,
            detokenizer=self._detokenizer(len(token_ids), params),
        )
        self.scheduler.add(request)
        self._requests[request_id] = request
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request; its output, with finish_reason `abort`, comes with the next step. Unknown ids are ignored:
        the request may have finished while the caller decided."""
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.abort(request)

    def step(self) -> list[RequestOutput]:
        """One iteration; returns an output for each request that gained a token or ended."""
        outputs, self._undelivered = self._undelivered, []
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if plan is None:
            return outputs + self._outputs(self.scheduler.take_ended())
        usage, num_running = self.scheduler.cache.usage(), len(self.scheduler.running)
        try:
            tokens = self.runner.execute(plan)
        except BaseException:
            self.runner.forget()
            self.scheduler.drop(plan)
            self._undelivered = outputs
            raise
        touched = self.scheduler.update(plan, tokens)
        self._metrics.record_step(plan, usage, num_running, time.perf_counter() - started)
        self._metrics.output_tokens += len(tokens)
        return outputs + self._outputs(touched)

    @property
    def has_unfinished(self) -> bool:
        """Is anything left to compute or to deliver?"""
        return self.scheduler.has_unfinished or bool(self._undelivered)

    # -- many requests ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Run prompts to their ends; results in input order. `params`: one for all, or one for each."""
        ids = self._add_all(prompts, params)
        finished: dict[str, RequestOutput] = {}
        with progress_bar("generating", len(ids), show=progress) as advance:
            for output in self._run(ids):
                if output.finished:
                    finished[output.request_id] = output
                    advance(1)
        return [finished[request_id] for request_id in ids]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Like `generate`, yielding an output each time a request gains a token; `request_id`s count in input order.
        Whoever stops reading early aborts what is left."""
        return self._run(self._add_all(prompts, params))

    def _add_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[str]:
        require(not isinstance(prompts, str), "give a list of prompts: write [prompt]")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        require(len(each) == len(prompts), f"{len(prompts)} prompts but {len(each)} sampling params: give one, or one each")
        ids: list[str] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                ids.append(self.add_request(prompt, p))
        except BaseException:
            self._abandon(ids)
            raise
        return ids

    def _run(self, ids: Sequence[str]) -> Iterator[RequestOutput]:
        """Step until these requests have ended; outputs of other requests wait for the next `step()`."""
        open_ids = set(ids)
        others: list[RequestOutput] = []
        try:
            while open_ids:
                for output in self.step():
                    if output.request_id not in open_ids:
                        others.append(output)
                        continue
                    if output.finished:
                        open_ids.discard(output.request_id)
                    yield output
        finally:
            self._abandon(list(open_ids))
            self._undelivered = others + self._undelivered

    def _abandon(self, ids: Iterable[str]) -> None:
        """Abort requests whose outputs nobody will read."""
        for request_id in ids:
            self.abort(request_id)
            self._requests.pop(request_id, None)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for request in requests:
            if request.id not in self._requests:
                continue
            outputs.append(RequestOutput([request]))
            if request.finished:
                del self._requests[request.id]
                self._metrics.finished += 1
                self._metrics.aborted += request.finish_reason == "abort"
        return outputs

    def _detokenizer(self, num_prompt_tokens: int, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer.backend, num_prompt_tokens, params.stop_strings)

    def metrics(self) -> dict[str, float | int | str | None]:
        """What the engine does now, and what it has done since it was built or since `reset_metrics()`."""
        m = self._metrics
        usage = self.scheduler.cache.usage()
        token_bytes = kv_bytes_per_token(self.runner.model.config, self.config.torch_dtype)
        return {
            "stage": self.stage,
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "steps": m.steps,
            "busy_time_s": m.busy_time,
            "computed_tokens": m.computed_tokens,
            "padded_tokens": m.padded_tokens,
            "padding_share": m.padding_share,
            "output_tokens": m.output_tokens,
            "finished": m.finished,
            "aborted": m.aborted,
            "peak_running": m.peak_running,
            "kv_pool_bytes": self.runner.attention.kv_bytes(),
            "kv_reserved_bytes": usage.reserved * token_bytes,
            "kv_used_bytes": usage.stored * token_bytes,
            "kv_reserved_peak_bytes": m.kv_peak_reserved * token_bytes,
            "kv_used_peak_bytes": m.kv_peak_stored * token_bytes,
            "kv_utilization": m.kv_utilization,
        }

    def reset_metrics(self) -> None:
        self._metrics = EngineMetrics()

    def close(self) -> None:
        """Abort what is left. Closing twice is no error."""
        self._abandon(list(self._requests))
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
