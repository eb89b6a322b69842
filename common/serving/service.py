"""What the endpoints share: admission, and what is noted when a request ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from common.engine import Engine
from common.prompts import Prompt
from common.serving import parameters
from common.serving.answer import Answer
from common.serving.engine_thread import Ended, EngineThread, Event, Job
from common.serving.errors import ApiError, shutting_down
from common.serving.metrics import ServerMetrics
from common.serving.options import ServerOptions
from common.serving.schema import Sampling
from common.serving.spans import Spans
from common.trace import StepTrace

TRACE_STEPS = 1000
log = logging.getLogger("folovllm.serving")


class Service:
    """The engine's thread, and who is in it. Everything here runs on the event loop."""

    def __init__(self, engine: Engine, options: ServerOptions, spans: Spans | None = None) -> None:
        self.engine = engine
        self.options = options
        self.thread = EngineThread(engine)
        self.metrics = ServerMetrics(engine.stage)
        self.model_name = options.served_name or _public_name(engine.config.model)
        self.draining = False
        self._spans = spans
        self._answers: dict[Job, Answer] = {}
        if engine.trace is None:
            engine.trace = StepTrace(TRACE_STEPS)

    @property
    def open_choices(self) -> int:
        """Answers that are being computed or wait."""
        return sum(job.params.n for job in self._answers)

    def drain(self) -> None:
        """Take nothing more; what is there has `options.drain` seconds."""
        self.draining = True
        log.info("draining", extra={"fields": {"open": self.open_choices}})
        self.thread.drain(self.options.drain)

    async def submit(
        self, body: Sampling, prompts: Sequence[Prompt], request_id: str, salt: str | None, trace_parent: str | None
    ) -> Answer:
        """Hand prompts to the engine. Raises `ApiError` or `UserError` for what cannot be, and 429 when it is full."""
        self._admit(len(prompts) * (body.n or 1))
        encoded = await asyncio.to_thread(
            lambda: [parameters.encode(self.engine, prompt, self.options) for prompt in prompts]
        )
        jobs = [
            Job(
                id=request_id if len(encoded) == 1 else f"{request_id}-{number}",
                prompt=token_ids,
                params=parameters.sampling_params(self.engine, body, len(token_ids), self.options),
                stream=bool(body.stream),
                salt=salt,
                post=self._post,
                trace_parent=trace_parent,
            )
            for number, token_ids in enumerate(encoded)
        ]
        self._admit(len(prompts) * (body.n or 1))  # others came while this one was encoded
        answer = Answer(self.thread, jobs)
        self._answers.update(dict.fromkeys(jobs, answer))
        answer.start()
        return answer

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
        self._answers[job].receive(job, event)
        if isinstance(event, Ended):
            del self._answers[job]
            self._note(job, event)

    def _note(self, job: Job, ended: Ended) -> None:
        """Metrics, spans and a line of the log."""
        output = ended.output
        outcome = "error" if ended.error else "abort" if job.cancelled else "ok"
        self.metrics.ended(job, output, outcome)
        fields: dict[str, object] = {
            "request_id": job.id, "outcome": outcome, "prompt_tokens": len(job.prompt), "n": job.params.n,
        }  # fmt: skip
        if output is not None:
            fields |= {
                "output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
                "finish_reason": output.finish_reason,
                "queue_s": output.queue_time,
                "ttft_s": output.ttft,
                "tpot_s": output.tpot,
                "e2e_s": output.e2e,
            }
            if self._spans is not None:
                self._spans.record(job, output, outcome)
        if ended.error is not None:
            fields |= {"status": ended.error.status_code, "error": ended.error.detail}
        log.info("request", extra={"fields": fields})


def _public_name(model: str) -> str:
    """Of a folder or file the last part only: clients need not know where it lies."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
