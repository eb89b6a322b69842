"""m1's rows, now called slots: each is taken when its request starts and given back the moment it ends."""

import heapq
from collections.abc import Sequence

from common.request import Request
from common.watch.kv_memory import KVUsage, Region


class SlotCache:
    """Slots of `slot_length` tokens. The lowest free one goes first, which keeps the slots in use close together."""

    def __init__(self, num_slots: int, slot_length: int) -> None:
        self.num_slots = num_slots
        self.slot_length = slot_length
        self._free = list(range(num_slots))
        self._slots: dict[str, int] = {}
        self._stored: dict[str, int] = {}

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        return num_tokens <= self.slot_length

    def can_admit(self, request: Request) -> bool:
        return bool(self._free)

    def grow(self, request: Request, upto: int) -> bool:
        """A slot is all that a request ever needs: the first call takes it, the others find it."""
        if request.id not in self._slots:
            if not self._free:
                return False
            self._slots[request.id] = heapq.heappop(self._free)
            self._stored[request.id] = 0
        return upto <= self.slot_length

    def mark_computed(self, request: Request, upto: int) -> None:
        request.num_computed_tokens = upto
        self._stored[request.id] = upto

    def block_table(self, request: Request) -> Sequence[int]:
        """A slot is one very long block."""
        return (self._slots[request.id],)

    def free(self, request: Request) -> None:
        if request.id in self._slots:
            heapq.heappush(self._free, self._slots.pop(request.id))
            del self._stored[request.id]

    def usage(self) -> KVUsage:
        return KVUsage(
            capacity=self.num_slots * self.slot_length,
            reserved=len(self._slots) * self.slot_length,
            stored=sum(self._stored.values()),
            blocks=len(self._slots),
        )

    def regions(self) -> list[Region]:
        length = self.slot_length
        return [Region(slot * length, length, self._stored[id], (id,)) for id, slot in self._slots.items()]

    def check_integrity(self) -> None:
        slots = sorted(self._free + list(self._slots.values()))
        assert slots == list(range(self.num_slots)), f"slots lost or owned twice: {slots}"
        assert self._slots.keys() == self._stored.keys()
        assert all(stored <= self.slot_length for stored in self._stored.values()), "a slot overflows"
