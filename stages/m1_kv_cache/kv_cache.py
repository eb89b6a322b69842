"""One row of `max_model_len` token slots for each request: simple, contiguous, and mostly empty."""

from collections.abc import Sequence

from common.request import Request
from common.watch.kv_memory import KVUsage, Region


class RowCache:
    """Counts rows. A static batch fills them in order and gives them back together, so no row needs a number."""

    def __init__(self, num_rows: int, row_length: int) -> None:
        self.num_rows = num_rows
        self.row_length = row_length
        self._stored: dict[str, int] = {}  # tokens in each request's row

    def fits(self, num_tokens: int, samples: int = 1) -> bool:
        return num_tokens <= self.row_length

    def can_admit(self, request: Request) -> bool:
        return len(self._stored) < self.num_rows

    def grow(self, request: Request, upto: int) -> bool:
        """A row is all that a request ever needs: the first call takes it, the others find it."""
        if upto > self.row_length:
            return False
        if request.id not in self._stored:
            if not self.can_admit(request):
                return False
            self._stored[request.id] = 0
        return True

    def mark_computed(self, request: Request, upto: int) -> None:
        request.num_computed_tokens = upto
        self._stored[request.id] = upto

    def block_table(self, request: Request) -> Sequence[int]:
        return ()

    def free(self, request: Request) -> None:
        self._stored.pop(request.id, None)

    def usage(self) -> KVUsage:
        return KVUsage(
            capacity=self.num_rows * self.row_length,
            reserved=len(self._stored) * self.row_length,
            stored=sum(self._stored.values()),
            blocks=len(self._stored),
        )

    def regions(self) -> list[Region]:
        length = self.row_length
        return [Region(row * length, length, stored, (id,)) for row, (id, stored) in enumerate(self._stored.items())]

    def check_integrity(self) -> None:
        assert len(self._stored) <= self.num_rows, "more requests than rows"
        assert all(stored <= self.row_length for stored in self._stored.values()), "a row overflows"
