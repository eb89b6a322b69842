"""What the prefix cache has saved."""

from common.request import Request
from common.watch.kv_memory import PrefixStats
from stages.m6_prefix_caching.block_pool import BlockPool


class Statistics:
    """Counts from the last reset on."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.counts = PrefixStats()

    def started(self, request: Request, cached: int, blocks: int) -> None:
        """A request starts with `cached` of its tokens from the cache, and shares `blocks` blocks."""
        if request.num_preemptions:
            self.counts.recovered += cached
            return
        request.num_cached_tokens = cached
        self.counts.asked += request.num_prompt_tokens
        self.counts.saved += cached
        self.counts.blocks += blocks

    def planned(self) -> None:
        self.counts.peak_shared = max(self.counts.peak_shared, self._pool.num_shared)

    def read(self, num_cached: int) -> PrefixStats:
        self.counts.shared, self.counts.cached = self._pool.num_shared, num_cached
        return self.counts

    def reset(self) -> None:
        self.counts = PrefixStats(peak_shared=self._pool.num_shared)
