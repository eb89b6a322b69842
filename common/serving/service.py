"""What the endpoints share: admission, and the records of a request that has ended."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from common.engine import Engine
from common.serving import parameters
from common.serving.answer import Answer
from common.serving.engine_thread import Ended, EngineThread, Event, Job
from common.serving.errors import ApiError, shutting_down
from common.serving.metrics import ServerMetrics, Snapshot
from common.serving.options import ServerOptions
from common.serving.schema import Sampling
from common.serving.spans import Spans
from common.serving.token_texts import TokenTexts
from common.text.prompts import Prompt
from common.watch.trace import StepTrace

TRACE_STEPS = 1000
LONG_TEXT = 1 << 14  # characters; longer prompts are encoded one at a time: short ones do not wait for many of them
ENCODERS = 2  # threads for shorter ones
WRITERS = 2  # threads for large answers
FIGURES_WITHIN = 0.25  # seconds that /metrics waits for a step; after that it shows the figures from before it
T = TypeVar("T")
log = logging.getLogger("folovllm.serving")


class Service:
    """The engine's thread and its open requests. Everything here runs on the event loop."""

    def __init__(self, engine: Engine, options: ServerOptions, spans: Spans | None = None) -> None:
        self.engine, self.options = engine, options
        self.metrics = ServerMetrics(engine.stage)
        self.thread = EngineThread(engine, self.metrics.gained, self._post)
        self.model_name = options.served_name or _public_name(engine.config.model)
        self._deadline: float | None = None  # of the drain
        self._spans = spans
        self._answers: dict[Job, Answer] = {}
        self._arriving = 0  # answers to prompts that are being encoded
        self._longest_text = parameters.longest_text(engine, options)
        self._encoders = ThreadPoolExecutor(ENCODERS), ThreadPoolExecutor(1)  # for short texts, and for long ones
        self._compilers = ThreadPoolExecutor(ENCODERS)  # of structures
        self.token_texts = TokenTexts(engine.tokenizer)
        self._writers = ThreadPoolExecutor(WRITERS)
        self._figures: Snapshot = engine.metrics()
        if engine.trace is None:
            engine.trace = StepTrace(TRACE_STEPS)

    @property
    def open_choices(self) -> int:
        """Answers that are being computed or wait."""
        return self._arriving + sum(job.params.n for job in self._answers)

    @property
    def draining(self) -> bool:
        return self._deadline is not None

    @property
    def drained(self) -> bool:
        """All requests have ended, or the time of the drain is over."""
        return self._deadline is not None and (self.open_choices == 0 or time.perf_counter() > self._deadline)

    def drain(self, seconds: float) -> None:
        """Refuse new requests; open ones get 503 after `seconds`."""
        self._deadline = time.perf_counter() + seconds
        log.info("draining", extra={"fields": {"open": self.open_choices, "seconds": seconds}})
        self.thread.drain(self._deadline)

    async def figures(self) -> Snapshot:
        with contextlib.suppress(TimeoutError):
            self._figures = await asyncio.wait_for(self.thread.call(Engine.metrics), FIGURES_WITHIN)
        return self._figures

    async def submit(
        self, body: Sampling, prompts: Sequence[Prompt], request_id: str, salt: str | None, trace_parent: str | None
    ) -> Answer:
        """Hand prompts to the engine. Raises `ApiError` or `UserError` for a bad request, and 429 for a full queue."""
        choices = len(prompts) * (body.n or 1)
        self._admit(choices)
        self._arriving += choices  # their places are taken from now on
        try:
            async with self._budget():
                structure, compiled = await self._compile(body)
                encoded = await self._encode(prompts, getattr(body, "chat_template_kwargs", None))
        finally:
            self._arriving -= choices
        jobs = [
            Job(
                id=request_id if len(encoded) == 1 else f"{request_id}-{number}",
                first_index=number * (body.n or 1),
                prompt=token_ids,
                params=parameters.sampling_params(self.engine, body, len(token_ids), self.options, structure),
                stream=bool(body.stream),
                salt=salt,
                trace_parent=trace_parent,
                priority=body.priority or 0,
                text=text if isinstance(text := prompts[number], str) else None,
                structure=compiled,
            )
            for number, token_ids in enumerate(encoded)
        ]
        answer = Answer(self.thread, jobs)
        for job in jobs:
            self._answers[job] = answer
            self.thread.submit(job)
        return answer

    async def write(self, work: Callable[[], T]) -> T:
        """A large answer, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, work)

    async def tokenize(self, prompt: Prompt, template_kwargs: dict[str, Any] | None) -> list[int]:
        async with self._budget():
            return (await self._encode([prompt], template_kwargs))[0]

    @contextlib.asynccontextmanager
    async def _budget(self) -> AsyncGenerator[None]:
        """Of all that a request needs before the engine takes it: it waits no longer for others."""
        try:
            async with asyncio.timeout(self.options.encode_timeout):
                yield
        except TimeoutError:
            message = f"Encoding the prompt took over {self.options.encode_timeout:g} seconds, waiting included."
            raise ApiError(503, message, code="encoding_timeout", headers={"Retry-After": "1"}) from None

    async def _compile(self, body: Sampling) -> tuple[dict[str, Any], object | None]:
        """What the answer has to fit, compiled."""
        param, given = parameters.structure(self.engine, body, self.options)
        if param is None:
            return given, None
        known = parameters.compiled(self.engine, param, given, known=True)
        run = asyncio.get_running_loop().run_in_executor
        return given, known or await run(self._compilers, parameters.compiled, self.engine, param, given)

    async def _encode(self, prompts: Sequence[Prompt], template_kwargs: dict[str, Any] | None) -> list[list[int]]:
        """Token ids. Text that cannot fit is refused before it is encoded."""
        lengths = [parameters.text_length(prompt) for prompt in prompts]
        if self._longest_text is not None and max(lengths) > self._longest_text:
            message = f"The prompt has {max(lengths)} characters; this server takes {self._longest_text} at most."
            param = "messages" if isinstance(prompts[0], parameters.Conversation) else "prompt"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        size = sum(lengths) + sum(getattr(prompt, "size", 0) for prompt in prompts) + len(str(template_kwargs))
        work = [(parameters.encode, self.engine, prompt, self.options, template_kwargs) for prompt in prompts]
        run, pool = asyncio.get_running_loop().run_in_executor, self._encoders[size > LONG_TEXT]
        return [await run(pool, *one) for one in work]

    def _admit(self, choices: int) -> None:
        if self.draining:
            raise shutting_down()
        places = self.engine.scheduler.max_num_seqs + self.options.max_queue
        most = min(self.options.max_n, places)
        if choices > most:
            message = f"{choices} answers asked for (prompts × n); this server gives {most} at most."
            raise ApiError(400, message, param="n")
        if choices > places - self.open_choices:
            message = "The queue is full. Try again in a moment."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    def _post(self, job: Job, event: Event) -> None:
        self._answers[job].receive(event)
        if isinstance(event, Ended):
            del self._answers[job]
            self._note(job, event)

    def _note(self, job: Job, ended: Ended) -> None:
        output = ended.output
        outcome = "error" if ended.error else "abort" if job.cancelled else "ok"
        self.metrics.ended(output, outcome)
        fields: dict[str, object] = {
            "request_id": job.id, "outcome": outcome, "prompt_tokens": len(job.prompt), "n": job.params.n,
        }  # fmt: skip
        if output is not None:
            fields |= {
                "output_tokens": output.num_generated, "finish_reason": output.finish_reason,
                "queue_s": output.queue_time, "ttft_s": output.ttft, "tpot_s": output.tpot, "e2e_s": output.e2e,
            }  # fmt: skip
            if self._spans is not None:
                self._spans.record(job, output, outcome)
        if ended.error is not None:
            fields |= {"status": ended.error.status_code, "error": ended.error.detail}
        log.info("request", extra={"fields": fields})


def _public_name(model: str) -> str:
    """The last part of a folder's or file's path: clients need not know where it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
