"""Iteration-level scheduling (Orca, OSDI '22, section 3.1): who runs is decided in every step."""

from common.config import EngineConfig
from common.kv_cache import KVCacheManager
from common.plan import Chunk, StepPlan
from common.scheduler import Scheduler


class ContinuousScheduler(Scheduler):
    """Requests join as soon as there is a slot and leave as soon as they end.

    Prefill first: as long as a request can start, the step computes the prompts of newcomers and nothing else;
    otherwise it computes one token for every running request.
    """

    def __init__(self, cache: KVCacheManager, config: EngineConfig) -> None:
        super().__init__(cache, config.max_num_seqs, config.scheduling_policy)
        self.max_num_batched_tokens = config.max_num_batched_tokens

    def plan(self) -> StepPlan | None:
        chunks = self._prefill() or self._decode()
        return StepPlan(chunks) if chunks else None

    def _prefill(self) -> list[Chunk]:
        """Whole prompts, up to `max_num_batched_tokens` in all; a longer prompt goes alone."""
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            length = request.num_tokens
            if chunks and length > budget:
                break
            if not self.cache.grow(request, length):
                break
            self._start(request)
            chunks.append(self._chunk(request, length))
            budget -= length
        return chunks

    def _decode(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in self.running:
            if request.ends_in_flight or request.rests:
                continue
            if not self.cache.grow(request, request.num_tokens):
                raise RuntimeError(f"{request.id} has outgrown its slot: it should have been refused")
            chunks.append(self._chunk(request, 1))
        return chunks
