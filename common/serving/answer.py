"""One request of a client, seen from the event loop: its jobs in the engine, and the events that they bring."""

import asyncio
from collections.abc import Sequence
from typing import Any

from common.serving.engine_thread import Delta, EngineThread, Event, Job


class ClientGone(Exception):
    """The client left before it was answered."""


class Answer:
    """Collects the events of its jobs, one for each prompt."""

    def __init__(self, thread: EngineThread, jobs: Sequence[Job]) -> None:
        self._thread, self._jobs = thread, jobs
        self._open = len(jobs)
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._prompt_tokens = sum(len(job.prompt) for job in jobs)
        self._completion_tokens = 0
        self._cached: dict[Job, int] = {}  # prompt tokens that the prefix cache had, of those that have begun

    def usage(self, so_far: int | None = None) -> dict[str, Any]:
        """At the end; or when the answers have `so_far` tokens."""
        prompt, completion = self._prompt_tokens, self._completion_tokens if so_far is None else so_far
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**usage, "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())}}

    def job(self, index: int) -> Job:
        """That brings the answer of this index."""
        return self._jobs[index // self._jobs[0].params.n]

    def receive(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._deltas.append(event)
            self._cached[self.job(event.index)] = event.num_cached
        else:
            self._open -= 1
            if event.output is not None:
                self._completion_tokens += event.output.num_generated
            self._error = self._error or event.error
        if self._deltas or self._error or not self._open:
            self._news.set()

    def cancel(self, gone: bool = False) -> None:
        """Abort what still runs. `gone`: because the client left; `next` then raises `ClientGone`."""
        if self._open:
            for job in self._jobs:
                self._thread.abort(job)
        if gone:
            self._error = self._error or ClientGone()
            self._news.set()

    async def next(self) -> list[Delta]:
        """The deltas since the last call, at least one; none at the end. Raises the error of a failed job."""
        await self._news.wait()
        if self._error is not None:
            raise self._error
        if self._open:  # else the end stays the end
            self._news.clear()
        deltas, self._deltas = self._deltas, []
        return deltas
