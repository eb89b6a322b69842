"""One thread owns the engine: commands reach it between two steps, and its events go to the event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from common.engine import Engine
from common.errors import UserError
from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import SamplingParams
from common.serving.errors import ApiError, refused, shutting_down, step_failed, structure_failed

T = TypeVar("T")
log = logging.getLogger("folovllm.serving")

FAILING_AFTER = 8  # failed steps in a row: open requests get an error, and `healthy` is False until a step works


@dataclass(frozen=True, slots=True)
class Delta:
    """What one answer gained: text, and the tokens it came from."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    offsets: list[int] | None = None  # where in the text each token's begins; with log-probabilities
    num_generated: int = 0  # so far, all of the answer
    prompt_logprobs: list[dict[int, float] | None] | None = None  # with `echo`
    num_cached: int = 0  # tokens of the prompt that the prefix cache had


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a job; `error` says why there is no answer. `output`: None if the engine never took it."""

    error: ApiError | None
    output: RequestOutput | None


Event = Delta | Ended


@dataclass(eq=False)
class Job:
    """One prompt on its way through the engine.

    text: the prompt, if it was given as text. structure: compiled, and kept until the engine takes it.
    first_index: of its n answers, among all answers to the client's request.
    stream: events as tokens come, instead of all at the end.
    salt: only prompts of the same salt may share cached blocks.
    trace_parent: the client's W3C trace context, for spans.
    """

    id: str
    first_index: int
    prompt: list[int]
    params: SamplingParams
    stream: bool
    salt: str | None
    trace_parent: str | None = None
    priority: int = 0
    text: str | None = None
    structure: object | None = None
    arrival_time: float = field(default_factory=time.perf_counter)
    # the engine thread's own notes, an entry for each of the n answers
    sent_text: list[int] = field(init=False)
    sent_tokens: list[int] = field(init=False)
    timed_tokens: list[int] = field(init=False)
    done: list[bool] = field(init=False)
    cancelled: bool = False
    error: ApiError | None = None

    def __post_init__(self) -> None:
        n = self.params.n
        self.sent_text, self.sent_tokens, self.timed_tokens, self.done = [0] * n, [0] * n, [0] * n, [False] * n


class EngineThread:
    """`submit`, `abort` and `call` may be called from any thread; they take effect before the next step.

    observe: called in the engine's thread, with each job that a step has touched and its output so far.
    post: called on the event loop, with each event.
    """

    def __init__(
        self, engine: Engine, observe: Callable[[Job, RequestOutput], None], post: Callable[[Job, Event], None]
    ) -> None:
        self._engine, self._observe, self._post = engine, observe, post
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._outbox: list[tuple[Job, Event]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._failures = 0  # failed steps in a row
        self._deadline = float("inf")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._add(job))

    def abort(self, job: Job) -> None:
        """Its client has gone: it leaves before the next step, and its `Ended` follows."""
        self._commands.put(lambda: self._cancel(job))

    async def call(self, question: Callable[[Engine], T]) -> T:
        """Ask the engine something between two steps."""
        answer: Future[T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():  # the caller has stopped waiting
                return
            try:
                answer.set_result(question(self._engine))
            except Exception as error:
                answer.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(answer)

    def drain(self, deadline: float) -> None:
        """A request that is not done by then, on `time.perf_counter()`'s clock, gets 503."""
        self._deadline = min(self._deadline, deadline)
        self._commands.put(lambda: None)  # wakes the thread

    def stop(self) -> None:
        """End the thread, and with 503 the requests that are still there; returns when it has ended."""
        self._commands.put(lambda: setattr(self, "_stopping", True))
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._failures < FAILING_AFTER

    def _run(self) -> None:
        device = self._engine.config.torch_device  # CUDA's current device belongs to a thread
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while not self._stopping:
                    self._obey()
                    if time.perf_counter() > self._deadline:
                        self._fail_all(shutting_down)
                    if self._has_work():
                        self._step()
                    self._flush()
        finally:
            self._fail_all(shutting_down)
            self._flush()

    def _has_work(self) -> bool:
        """Without an open request, a step that keeps failing is not tried again until a request comes."""
        return self._engine.has_unfinished and (bool(self._jobs) or self._failures == 0)

    def _obey(self) -> None:
        """Carry out the commands that are there; without work, wait for one."""
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(block=not self._has_work())
            while True:
                try:
                    command()
                except Exception:
                    log.exception("command failed")
                command = self._commands.get_nowait()

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception:
            self._failures += 1
            log.exception("step failed", extra={"fields": {"failures_in_a_row": self._failures}})
            if self._failures >= FAILING_AFTER:
                self._fail_all(step_failed)
            return
        if any(output.finish_reason != "abort" for output in outputs):
            self._failures = 0
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is not None:
                self._take(job, output)

    def _take(self, job: Job, output: RequestOutput) -> None:
        """Pass on what a request gained. An `abort` that was not asked for: the step that computed it has failed."""
        try:
            self._observe(job, output)
            if not job.cancelled and any(sample.finish_reason == "abort" for sample in output.outputs):
                failures = [sample.failure for sample in output.outputs if sample.failure]
                job.error = structure_failed(failures[0]) if failures else step_failed()
                self._cancel(job)
            if not job.cancelled and (job.stream or output.finished):
                for sample in output.outputs:
                    self._gained(job, sample, output)
        except Exception:
            log.exception("output failed", extra={"fields": {"request_id": job.id}})
            job.error = step_failed()
            self._cancel(job)
        if output.finished:
            self._end(job, output)

    def _gained(self, job: Job, sample: CompletionOutput, output: RequestOutput) -> None:
        """Text held back for a stop string or an incomplete character comes later, with its tokens."""
        index = sample.index
        if job.done[index]:
            return
        text = sample.readable[job.sent_text[index] :]
        job.done[index] = sample.finish_reason is not None
        if not text and not job.done[index]:
            return
        start = job.sent_tokens[index]
        logprobs = None if sample.logprobs is None else sample.logprobs[start:]
        token_ids = sample.token_ids[start:]
        job.sent_text[index] += len(text)
        job.sent_tokens[index] += len(token_ids)
        offsets = None if logprobs is None else sample.text_offsets[start:]
        delta = Delta(
            job.first_index + index, text, token_ids, logprobs, sample.finish_reason, offsets, sample.num_generated,
            output.prompt_logprobs, output.num_cached_tokens,
        )  # fmt: skip
        self._outbox.append((job, delta))

    def _add(self, job: Job) -> None:
        try:
            self._engine.add_request(
                job.prompt,
                job.params,
                request_id=job.id,
                arrival_time=job.arrival_time,
                cache_salt=job.salt,
                priority=job.priority,
            )
            self._jobs[job.id] = job
        except UserError as error:
            job.error = refused(error)
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": job.id}})
            job.error = step_failed()
        if job.error is not None:
            self._end(job, None)

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if job.id in self._jobs:
            self._engine.abort(job.id)

    def _fail_all(self, why: Callable[[], ApiError]) -> None:
        for job in list(self._jobs.values()):
            if not job.cancelled:
                job.error = why()
                with contextlib.suppress(Exception):
                    self._cancel(job)
            self._end(job, None)

    def _end(self, job: Job, output: RequestOutput | None) -> None:
        self._jobs.pop(job.id, None)
        self._outbox.append((job, Ended(job.error, output)))

    def _flush(self) -> None:
        """One wake-up of the event loop for all that a step has brought."""
        batch, self._outbox = self._outbox, []
        if batch and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._deliver, batch)

    def _deliver(self, batch: list[tuple[Job, Event]]) -> None:
        for job, event in batch:
            try:
                self._post(job, event)
            except Exception:  # the others' events still count
                log.exception("event failed", extra={"fields": {"request_id": job.id}})
