"""No KV cache. Nothing is remembered, so a request's `num_computed_tokens` stays 0, and every step starts over."""

from collections.abc import Sequence

from common.request import Request
from common.watch.kv_memory import KVUsage, Region


class NoCache:
    """Always has room, never keeps anything."""

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        return True

    def can_admit(self, request: Request) -> bool:
        return True

    def grow(self, request: Request, upto: int) -> bool:
        return True

    def mark_computed(self, request: Request, upto: int) -> None:
        pass

    def block_table(self, request: Request) -> Sequence[int]:
        return ()

    def free(self, request: Request) -> None:
        pass

    def usage(self) -> KVUsage:
        return KVUsage()

    def regions(self) -> list[Region]:
        return []

    def check_integrity(self) -> None:
        pass
