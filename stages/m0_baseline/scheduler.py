"""Static batching: a batch starts together, and the next one waits until the last request of this one has ended."""

from common.kv_cache import KVCacheManager
from common.plan import Chunk, StepPlan
from common.request import Request
from common.scheduler import Scheduler


class StaticScheduler(Scheduler):
    """Batches of up to `max_num_seqs` requests in order of arrival, as wide as they were at their start.

    A step computes one row for each request of the batch, padded to the longest. A finished request's row is computed
    too, in vain, until the whole batch is done.
    """

    plans_ahead = False  # which requests end is known only when the step is done

    def __init__(self, cache: KVCacheManager, max_num_seqs: int) -> None:
        super().__init__(cache, max_num_seqs)
        self.batch: list[Request] = []

    def plan(self) -> StepPlan | None:
        if not self.running:
            self._next_batch()
        if not self.batch:
            return None
        chunks = [self._row(request) for request in self.batch]
        longest = max(chunk.length for chunk in chunks)
        plan = StepPlan(chunks)
        plan.padded_tokens = longest * len(chunks) - plan.num_tokens
        return plan

    def _next_batch(self) -> None:
        while self.waiting and len(self.batch) < self.max_num_seqs:
            request = self.waiting[0]
            if not self.cache.grow(request, request.num_tokens + request.params.max_tokens):
                break
            self._start(request)
            self.batch.append(request)

    def _row(self, request: Request) -> Chunk:
        """Whatever of the request is not cached: all of it without a KV cache, its last token with one."""
        length = request.num_tokens - request.num_computed_tokens
        if not request.finished:
            return self._chunk(request, length)
        request.num_open_chunks += 1
        table = self.cache.block_table(request)
        return Chunk(request, request.num_computed_tokens, length, table, samples=False, idle=True)

    def _release(self, request: Request) -> None:
        """Rows are given back all together, when the last request of the batch has ended."""
        if not self.running:
            for member in self.batch:
                self.cache.free(member)
            self.batch = []
