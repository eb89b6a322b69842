"""m2's policy where memory can run out: admission by free blocks, and preemption when a request cannot grow."""

from collections import deque
from collections.abc import Sequence

from common.config import EngineConfig
from common.plan import Chunk, StepPlan
from common.request import Request
from common.scheduler import Scheduler
from stages.m3_paged_kv.forks import fork_siblings
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.preemption import Preemption


class PagedScheduler(Scheduler):
    """Prefill first, as in m2.

    A request holds blocks for the tokens that it has, not for those to come. When one cannot grow, the least urgent
    request gives up its blocks.
    """

    cache: PagedCache

    def __init__(self, cache: PagedCache, config: EngineConfig) -> None:
        super().__init__(cache, config.max_num_seqs, config.scheduling_policy)
        self.preemption = Preemption(self, cache)
        self.max_num_batched_tokens = config.max_num_batched_tokens

    def add(self, request: Request, siblings: Sequence[Request] = ()) -> None:
        """Siblings (n > 1) do not wait in the queue: they fork in the plan that computes the end of the prompt."""
        request.siblings = list(siblings)
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        plan = StepPlan()
        if self.preemption.swapped_first():
            self.preemption.swap_in(plan)
        else:
            self._prefill(plan)
        if not plan.chunks:
            self._decode(plan)
        plan.copies = self.cache.take_copies()
        return plan if plan.chunks else None

    def _prefill(self, plan: StepPlan) -> None:
        """Whole prompts (and what a preempted request had generated), up to `max_num_batched_tokens` in all; a longer
        one goes alone."""
        budget = self.max_num_batched_tokens
        while self.waiting and not self.waiting[0].rests and not self.preemption.swapped_first():
            request = self.waiting[0]
            length = request.num_tokens
            if not self.has_room_for(request):
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
        while queue:
            request = queue.popleft()
            if not request.rests and self.preemption.make_room(request, queue, plan):
                plan.chunks.append(self._chunk(request, 1))

    def _chunk(self, request: Request, length: int) -> Chunk:
        chunk = super()._chunk(request, length)
        if chunk.samples and request.siblings:
            chunk.forks = fork_siblings(request, self.cache, self.running)
        return chunk
