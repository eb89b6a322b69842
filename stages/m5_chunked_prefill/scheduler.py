"""Chunked prefill with decodes that never stall (Sarathi-Serve, OSDI '24, sections 4.1 and 4.2)."""

from collections import deque
from collections.abc import Mapping, Sequence

from common.config import EngineConfig
from common.errors import require
from common.kv_cache import PagedManager
from common.plan import Chunk, StepPlan
from common.request import Request, SampledToken
from common.scheduler import Scheduler
from stages.m3_paged_kv.forks import fork_siblings
from stages.m3_paged_kv.preemption import Preemption
from stages.m5_chunked_prefill.chunk_size import choose_chunk_size


class ChunkedScheduler(Scheduler):
    """Every step has a budget of tokens. Each decoding request gets one of them first; prompts share the rest, and
    continue in the next step where they did not fit.

    The budget is `max_num_batched_tokens`; in a step that also decodes, prompts get at most a chunk size of it, so that
    no step becomes long. Admission needs blocks for the whole prompt, not only for its first chunk: a prompt that has
    started takes no blocks from others.
    """

    cache: PagedManager

    def __init__(self, cache: PagedManager, config: EngineConfig) -> None:
        super().__init__(cache, config.max_num_seqs, config.scheduling_policy)
        require(
            config.max_num_batched_tokens >= config.max_num_seqs,
            f"max_num_batched_tokens={config.max_num_batched_tokens} is less than max_num_seqs={config.max_num_seqs}: "
            "a step must have room for a token of everyone. Raise the one or lower the other",
        )
        self.cache = cache
        self.preemption = Preemption(self, cache)
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.chunk_size = choose_chunk_size(config)

    def add(self, request: Request, siblings: Sequence[Request] = ()) -> None:
        """Siblings (n > 1) do not wait in the queue: they fork off when the prompt that they share is computed."""
        request.siblings = list(siblings)
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        plan = StepPlan()
        self.preemption.swap_in(plan)
        self._decode(plan)
        room = self._room_for_prompts(len(plan.chunks))
        room = self._continue_prompts(plan, room)
        if not plan.preempted:
            self._admit(plan, room)
        plan.copies = self.cache.take_copies()
        return plan if plan.chunks else None

    def update(self, plan: StepPlan, tokens: Mapping[str, SampledToken]) -> list[Request]:
        self.chunk_size.observe(plan)
        return super().update(plan, tokens)

    def _decode(self, plan: StepPlan) -> None:
        """One token for each request whose prompt is computed, the most urgent first; the last ones in this order, also
        those with a prompt under way, make room if they must."""
        queue = deque(sorted((r for r in self.running if not r.ends_in_flight), key=self.waiting.order))
        while queue:
            request = queue.popleft()
            if _remaining(request) == 1 and not request.rests and self.preemption.make_room(request, queue, plan):
                plan.chunks.append(self._chunk(request, 1))

    def _room_for_prompts(self, num_decodes: int) -> int:
        room = self.max_num_batched_tokens - num_decodes
        return min(room, self.chunk_size.tokens) if num_decodes else room

    def _continue_prompts(self, plan: StepPlan, room: int) -> int:
        """Prompts under way, the most urgent first; returns the room that is left. Their blocks are theirs already."""
        under_way = [r for r in self.running if _remaining(r) > 1 and not (r.ends_in_flight or r.rests)]
        for request in sorted(under_way, key=self.waiting.order):
            room = self._prefill(request, room, plan)
        return room

    def _admit(self, plan: StepPlan, room: int) -> None:
        """Start waiting requests, as long as there is room in the step, and blocks for their whole prompts."""
        while room and self.waiting and not self.waiting[0].rests and not self.preemption.swapped_first():
            request = self.waiting[0]
            if not self.has_room_for(request) or not self.cache.can_admit(request):
                break
            self.cache.attach_prefix(request)
            if not self.cache.grow(request, request.num_tokens):
                raise RuntimeError(f"{request.id} was admitted, and there is no room for its prompt")
            self._start(request)
            room = self._prefill(request, room, plan)

    def _prefill(self, request: Request, room: int, plan: StepPlan) -> int:
        """The next chunk of a prompt, as long as there is room; returns what is left."""
        length = min(_remaining(request), room)
        if length:
            plan.chunks.append(self._chunk(request, length))
        return room - length

    def _chunk(self, request: Request, length: int) -> Chunk:
        chunk = super()._chunk(request, length)
        if chunk.samples and request.siblings:
            chunk.forks = fork_siblings(request, self.cache, self.running)
        return chunk


def _remaining(request: Request) -> int:
    """Tokens to compute before the next one can be sampled: 1 for a decode."""
    return request.num_tokens - request.num_computed_tokens
