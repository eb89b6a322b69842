"""m2's policy where memory can run out: admission by free blocks, and preemption when a request cannot grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from common.config import EngineConfig
from common.plan import Chunk, StepPlan
from common.request import Request, RequestStatus
from common.scheduler import Scheduler
from stages.m3_paged_kv.kv_cache import PagedCache


class PagedScheduler(Scheduler):
    """Prefill first, as in m2. Who waits and who was swapped out stand in one order: the most urgent starts first.

    A request holds blocks for the tokens that it has, not for those that it may come to have. When one cannot grow,
    the running request that is lowest in priority, then newest, gives up its blocks: to the CPU pool where that has
    room, otherwise it is computed again later, prompt and output together.
    """

    cache: PagedCache

    def __init__(self, cache: PagedCache, config: EngineConfig) -> None:
        super().__init__(cache, config.max_num_seqs, config.scheduling_policy)
        self.max_num_batched_tokens = config.max_num_batched_tokens

    def add(self, request: Request, siblings: Sequence[Request] = ()) -> None:
        """Siblings (n > 1) do not wait in the queue: they fork off when the prompt that they share is computed."""
        request.siblings = list(siblings)
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        plan = StepPlan()
        if self._swapped_first():
            self._swap_in(plan)
        else:
            self._prefill(plan)
        if not plan.chunks:
            self._decode(plan)
        plan.copies = self.cache.take_copies()
        return plan if plan.chunks else None

    def _swapped_first(self) -> bool:
        """Is the first of the swapped ones more urgent than everyone who waits?"""
        if not self.swapped or not self.waiting:
            return bool(self.swapped)
        return self.waiting.order(self.swapped[0]) < self.waiting.order(self.waiting[0])

    def _prefill(self, plan: StepPlan) -> None:
        """Whole prompts (and what a preempted request had generated), up to `max_num_batched_tokens` in all; a longer
        one goes alone."""
        budget = self.max_num_batched_tokens
        while self.waiting and not self._swapped_first():
            request = self.waiting[0]
            length = request.num_tokens
            if len(self.running) + 1 + len(request.siblings) > self.max_num_seqs:
                break
            if (plan.chunks and length > budget) or not self.cache.can_admit(request):
                break
            self.cache.grow(request, length)
            self._start(request)
            plan.chunks.append(self._chunk(request, length))
            budget -= length

    def _decode(self, plan: StepPlan) -> None:
        """One token for everyone, the most urgent first; the last ones in this order make room if they must."""
        queue = deque(sorted((r for r in self.running if not r.ends_in_flight), key=self.waiting.order))
        ending = len(self.cache.tables) - len(queue)
        while queue:
            request = queue.popleft()
            while not self.cache.grow(request, request.num_tokens):
                if ending:
                    break  # somebody's last step is in flight: wait for those blocks
                victim = queue.pop() if queue else request
                self._preempt(victim, plan)
                if victim is request:
                    break
            else:
                plan.chunks.append(self._chunk(request, 1))

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        self.running.remove(victim)
        victim.num_preemptions += 1
        plan.preempted.append(victim)
        moves = self.cache.swap_out(victim)
        if moves is not None:
            plan.swap_out += moves
            victim.status = RequestStatus.SWAPPED
            self.swapped.append(victim)
        else:
            self.cache.free(victim)
            victim.num_computed_tokens = 0
            victim.status = RequestStatus.WAITING
            self.waiting.append(victim)

    def _swap_in(self, plan: StepPlan) -> None:
        """`swap_in` leaves a block for everyone to grow into, so that no block moves both ways in one step."""
        while self._swapped_first() and len(self.running) < self.max_num_seqs:
            request = self.swapped[0]
            moves = self.cache.swap_in(request)
            if moves is None:
                break
            plan.swap_in += moves
            plan.resumed.append(request)
            self.swapped.remove(request)
            self.running.append(request)
            request.status = RequestStatus.RUNNING

    def _chunk(self, request: Request, length: int) -> Chunk:
        chunk = super()._chunk(request, length)
        if chunk.samples and request.siblings:
            chunk.forks = self._fork(request)
        return chunk

    def _fork(self, parent: Request) -> list[Request]:
        """The prompt is about to be computed: its siblings share its blocks and draw their own first tokens."""
        forks, parent.siblings = parent.siblings, []
        for child in forks:
            self.cache.fork(parent, child)
            child.num_in_flight += 1
            child.num_pending_tokens += 1
            child.status = RequestStatus.RUNNING
            child.scheduled_time = parent.scheduled_time
            self.running.append(child)
        return forks
