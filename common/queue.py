"""The queue of waiting requests, in the order in which they may start."""

import bisect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from common.request import Request

AGEING_SECONDS = 10.0  # under `priority`, this waiting time is worth one level, so that no request starves


class WaitingQueue:
    """Sorted by `order`; the first one is the next to start.

    `fcfs`: by arrival. `priority`: by level (a lower number is more urgent), raised by waiting: at time t
    `priority - (t - arrival) / AGEING_SECONDS`. As t is the same for all, the order follows from the constant part,
    `priority + arrival / AGEING_SECONDS`, and never changes. A preempted request finds its old place again.
    """

    def __init__(self, policy: str = "fcfs") -> None:
        self.policy = policy
        self.order: Callable[[Request], Any] = attrgetter("number") if policy == "fcfs" else self._by_priority
        self._requests: list[Request] = []

    @staticmethod
    def _by_priority(request: Request) -> tuple[float, int]:
        return (request.priority + request.arrival_time / AGEING_SECONDS, request.number)

    def append(self, request: Request) -> None:
        bisect.insort(self._requests, request, key=self.order)

    def remove(self, request: Request) -> None:
        at = bisect.bisect_left(self._requests, self.order(request), key=self.order)
        if at == len(self._requests) or self._requests[at] is not request:
            raise RuntimeError(f"{request.id} does not wait here")
        del self._requests[at]

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)
