"""When each request of a run is submitted: by the clock, by the tokens of others, or at the end of another."""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.recipes import STEADY, BenchRequest


class Arrival(NamedTuple):
    """A request that is due. time: since when, in seconds after the start; prompt: the whole of it."""

    time: float
    number: int
    prompt: list[int]


class Arrivals:
    """Hands out each request once. Its caller reports every token (`gained`) and every end (`ended`)."""

    def __init__(self, requests: Sequence[BenchRequest]) -> None:
        self._requests = requests
        self._due = [Arrival(r.arrival, i, r.prompt) for i, r in enumerate(requests) if r.by_the_clock]
        heapq.heapify(self._due)
        self._made = {index: 0 for index, request in enumerate(requests) if request.group == STEADY}
        triggers = [(r.after_tokens, i) for i, r in enumerate(requests) if r.after_tokens is not None]
        self._triggers = deque(sorted(triggers))
        self._followers: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.follows is not None:
                self._followers[request.follows].append(index)
        self.left = len(requests)
        """Requests that have not been handed out."""

    def due(self, now: float) -> list[Arrival]:
        """Those that have arrived by now, seconds after the start."""
        found: list[Arrival] = []
        while self._due and self._due[0].time <= now:
            found.append(heapq.heappop(self._due))
        self.left -= len(found)
        return found

    def check_idle(self) -> None:
        """With nothing running, only the clock can bring the next one."""
        if self.left and not self._due:
            raise RuntimeError(f"{self.left} requests wait for tokens that no request makes: the workload is wrong")

    def gained(self, indices: Iterable[int], now: float) -> None:
        """These requests have a token more."""
        if not self._triggers:
            return
        for index in indices:
            if index in self._made:
                self._made[index] += 1
        slowest = min(self._made.values(), default=0)
        while self._triggers and self._triggers[0][0] <= slowest:
            _, index = self._triggers.popleft()
            heapq.heappush(self._due, Arrival(now, index, self._requests[index].prompt))

    def ended(self, index: int, whole: list[int], at: float) -> None:
        """A request has its last token. whole: its prompt and output; at: when that token came."""
        for follower in self._followers.pop(index, ()):
            request = self._requests[follower]
            heapq.heappush(self._due, Arrival(at + request.arrival, follower, whole[: request.keep] + request.prompt))
