"""When memory runs out: which request gives way, and how it comes back (PagedAttention, section 4.5)."""

from collections import deque

from common.kv_cache import PagedManager
from common.plan import StepPlan
from common.request import Request, RequestStatus
from common.scheduler import Scheduler


class Preemption:
    """Serves one scheduler. Waiting and swapped requests have one order: the most urgent starts first."""

    def __init__(self, scheduler: Scheduler, cache: PagedManager) -> None:
        self._scheduler = scheduler
        self._cache = cache

    def make_room(self, request: Request, others: deque[Request], plan: StepPlan) -> bool:
        """Grow a running request to all its tokens. While there is no room, the last of `others` (most urgent first)
        gives up its blocks; with none left, the request gives up its own. False: it is not computed in this step."""
        while not self._cache.grow(request, request.num_tokens):
            going_on = sum(not r.ends_in_flight for r in self._scheduler.running)
            if len(self._cache.tables) > going_on:
                return False  # a request's last step is in flight: wait for its blocks
            if any(r.rests for r in self._scheduler.running):
                return False  # this plan may have no place for it: what moves needs a step to move in
            victim = others.pop() if others else request
            self.preempt(victim, plan)
            if victim is request:
                return False
        return True

    def preempt(self, victim: Request, plan: StepPlan) -> None:
        """Its blocks go to the CPU pool where that has room; otherwise it is computed again later, prompt and output
        together. Its last step may still be in flight: this plan's moves and writes are queued behind it."""
        s = self._scheduler
        s.running.remove(victim)
        victim.num_preemptions += 1
        plan.preempted.append(victim)
        moves = self._cache.swap_out(victim)
        if moves is not None:
            plan.swap_out += moves
            victim.status = RequestStatus.SWAPPED
            s.swapped.append(victim)
        else:
            self._cache.free(victim)
            victim.num_computed_tokens = 0
            victim.status = RequestStatus.WAITING
            s.waiting.append(victim)

    def swapped_first(self) -> bool:
        """Is the first swapped request more urgent than every waiting one?"""
        waiting, swapped = self._scheduler.waiting, self._scheduler.swapped
        if not swapped or not waiting:
            return bool(swapped)
        return waiting.order(swapped[0]) < waiting.order(waiting[0])

    def swap_in(self, plan: StepPlan) -> None:
        """`PagedCache.swap_in` leaves room for each request to grow, so no block moves both ways in one step."""
        s = self._scheduler
        while self.swapped_first() and not s.swapped[0].rests and s.has_room_for(s.swapped[0]):
            request = s.swapped[0]
            moves = self._cache.swap_in(request)
            if moves is None:
                break
            plan.swap_in += moves
            plan.resumed.append(request)
            s.swapped.remove(request)
            s.running.append(request)
            request.status = RequestStatus.RUNNING
