"""What the prefix cache has saved."""

from __future__ import annotations

from common.kv_cache import PrefixStats
from common.request import Request
from stages.m6_prefix_caching.block_pool import BlockPool


class Statistics:
    """Counts from the last reset on."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._stats = PrefixStats()

    def started(self, request: Request, cached: int, blocks: int) -> None:
        """A request starts with so many of its tokens cached, and so many blocks shared."""
        if request.num_preemptions:
            self._stats.recovered += cached
            return
        request.num_cached_tokens = cached
        self._stats.asked += request.num_prompt_tokens
        self._stats.saved += cached
        self._stats.blocks += blocks

    def evicted(self) -> None:
        self._stats.evictions += 1

    def planned(self) -> None:
        """A plan is made: blocks are shared by requests alone."""
        self._stats.peak_shared = max(self._stats.peak_shared, self._pool.num_shared)

    def read(self, num_cached: int) -> PrefixStats:
        self._stats.shared, self._stats.cached = self._pool.num_shared, num_cached
        return self._stats

    def reset(self) -> None:
        self._stats = PrefixStats(peak_shared=self._pool.num_shared)
