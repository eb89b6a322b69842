"""What every scheduler shares: queues, results, finishing, aborts. A stage's scheduler adds its policy, `plan()`."""

import abc
from collections.abc import Mapping, Sequence

from common.kv_cache import KVCacheManager, PagedManager, PrefixCache
from common.plan import Chunk, StepPlan
from common.queue import WaitingQueue
from common.request import Request, RequestStatus, SampledToken
from common.watch import clock


class Scheduler(abc.ABC):
    """Decides who runs when. Owns the queues; asks the KV cache for room; touches no tensor.

    `plans_ahead`: may plan while a step is in flight. Policies then leave out requests that `ends_in_flight`.
    """

    plans_ahead = True

    def __init__(self, cache: KVCacheManager, max_num_seqs: int, policy: str = "fcfs") -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.waiting = WaitingQueue(policy)
        self.swapped = WaitingQueue(policy)
        self.running: list[Request] = []
        self._ended: list[Request] = []  # finished outside of update(): reported by the next one
        self._num_sampled = 0

    @abc.abstractmethod
    def plan(self) -> StepPlan | None:
        """What to compute in the next step; None: nothing."""

    def add(self, request: Request, siblings: Sequence[Request] = ()) -> None:
        """Queue a request, and the other samples of its prompt (n > 1)."""
        for one in (request, *siblings):
            self.waiting.append(one)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped or self._ended)

    @property
    def num_committed_seqs(self) -> int:
        """Running sequences, and siblings that fork when the prompt that they share is computed."""
        return sum(1 + len(request.siblings) for request in self.running)

    def has_room_for(self, request: Request) -> bool:
        """Do it and its siblings fit into max_num_seqs?"""
        return self.num_committed_seqs + 1 + len(request.siblings) <= self.max_num_seqs

    def update(self, plan: StepPlan, tokens: Mapping[str, SampledToken]) -> list[Request]:
        """Take the sampled tokens of a step; returns the requests that gained a token or ended."""
        now = clock.now()
        touched: list[Request] = []
        for chunk in plan.chunks:
            for request in (chunk.request, *chunk.forks) if chunk.forks else (chunk.request,):
                request.num_open_chunks -= 1
                if chunk.samples and not request.finished and not request.abort_requested:
                    request.append(tokens[request.id], now)
                    self._num_sampled += request.params.max_tokens > 0
                    touched.append(request)
                    if request.finish_reason is None:
                        continue
                    self._finish(request, request.finish_reason)
                elif chunk.samples:
                    request.num_tokens -= 1  # it ended while this step was in flight: one token too many
                if request.abort_requested and not request.finished:
                    self._finish(request, "abort")
                    touched.append(request)
                if request.finished and request.num_open_chunks == 0:
                    self._release(request)
        return self.take_ended() + touched

    def abort(self, request: Request) -> None:
        """End a request now, or, while a step that computes it is in flight, in the `update()` of that step."""
        if request.finished:
            return
        request.abort_requested = True
        for sibling in request.siblings:  # not forked yet: they are in no queue and hold nothing
            self._end(sibling, "abort")
        request.siblings = []
        if request.num_open_chunks == 0:
            self._finish(request, "abort")
            self._release(request)
            self._ended.append(request)

    def drop(self, plan: StepPlan) -> None:
        """A step failed: end its requests and give back all that they hold, so that the engine can go on. What the step
        has written is unknown, so no cached beginning is trusted either."""
        if isinstance(self.cache, PrefixCache):
            self.cache.reset_prefix_cache()
        for chunk in plan.chunks:
            for request in (chunk.request, *chunk.forks):
                request.num_open_chunks -= 1
                request.num_tokens -= chunk.samples
                if request.finished and request.num_open_chunks == 0:
                    self._release(request)
                self.abort(request)
        swapped_out = [request for request in plan.preempted if request.status is RequestStatus.SWAPPED]
        for request in (*swapped_out, *plan.resumed):
            self.abort(request)  # its blocks may not have reached the other pool

    def recover(self) -> None:
        """Planning failed half way, and all steps in flight have been dropped. What the lost plan had moved is unknown:
        requests that hold memory are ended, the others go on waiting."""
        if isinstance(self.cache, PrefixCache):
            self.cache.reset_prefix_cache()
        if isinstance(self.cache, PagedManager):
            self.cache.take_copies()
        for request in (*self.running, *self.swapped):
            request.num_open_chunks, request.num_tokens = 0, len(request.token_ids)
            self.abort(request)
        for request in self.waiting:  # it may have been about to start
            self._release(request)
            request.num_computed_tokens = 0

    def take_num_sampled(self) -> int:
        """How many tokens requests have gained, counted once."""
        count, self._num_sampled = self._num_sampled, 0
        return count

    def take_ended(self) -> list[Request]:
        """The requests that ended outside of a step, once."""
        ended, self._ended = self._ended, []
        return ended

    # -- for the policies -------------------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        """Move a request from waiting to running."""
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        if request.scheduled_time is None:
            request.scheduled_time = clock.now()

    def _chunk(self, request: Request, length: int) -> Chunk:
        """Plan the next `length` tokens of a request, for which the cache has grown already."""
        start = request.num_computed_tokens
        samples = start + length == request.num_tokens
        chunk = Chunk(request, start, length, self.cache.block_table(request), samples)
        request.num_open_chunks += 1
        request.num_tokens += samples
        self.cache.mark_computed(request, start + length)
        return chunk

    def _finish(self, request: Request, reason: str) -> None:
        """Take a request out of its queue."""
        queues = {RequestStatus.WAITING: self.waiting, RequestStatus.SWAPPED: self.swapped}
        queues.get(request.status, self.running).remove(request)
        self._end(request, reason)

    @staticmethod
    def _end(request: Request, reason: str) -> None:
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.finish_time = clock.now()

    def _release(self, request: Request) -> None:
        """Nothing of the request is in flight any more: its memory can go."""
        self.cache.free(request)
