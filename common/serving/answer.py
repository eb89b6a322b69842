"""One request of a client, seen from the event loop: its jobs in the engine, and the events that they bring."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.serving.engine_thread import Delta, EngineThread, Event, Job
from common.serving.errors import ApiError


class ClientGone(Exception):
    """The client left before it was answered."""


class Answer:
    """Collects the events of its jobs, one for each prompt."""

    def __init__(self, thread: EngineThread, jobs: Sequence[Job]) -> None:
        self._thread = thread
        self._jobs = jobs
        self._open = len(jobs)
        self._events: asyncio.Queue[Delta | ApiError | ClientGone | None] = asyncio.Queue()
        self._prompt_tokens = sum(len(job.prompt) for job in jobs)
        self._completion_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def receive(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._completion_tokens += len(event.token_ids)
            self._events.put_nowait(event)
            return
        self._open -= 1
        if event.error is not None:
            self._events.put_nowait(event.error)
        if self._open == 0:
            self._events.put_nowait(None)

    def cancel(self, gone: bool = False) -> None:
        """Abort what still runs. `gone`: because the client left; `next` then raises `ClientGone`."""
        if self._open:
            for job in self._jobs:
                self._thread.abort(job)
        if gone:
            self._events.put_nowait(ClientGone())

    async def next(self) -> list[Delta]:
        """The deltas since the last call, at least one; none at the end. Raises the error of a failed job."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, Exception):
                raise event
            if event is None:
                self._events.put_nowait(None)  # the end stays the end
                break
            deltas.append(event)
        return deltas
