"""One row of `max_model_len` token slots for each request: simple, contiguous, and mostly empty."""

from __future__ import annotations

from collections.abc import Sequence

from common.kv_cache import KVUsage
from common.request import Request


class RowCache:
    """Hands out whole rows. Row `r` holds the slots `r * row_length ... (r + 1) * row_length - 1`."""

    def __init__(self, num_rows: int, row_length: int) -> None:
        self.num_rows = num_rows
        self.row_length = row_length
        self._free = list(range(num_rows))[::-1]
        self._rows: dict[str, int] = {}
        self._stored: dict[str, int] = {}

    def can_admit(self, request: Request) -> bool:
        return bool(self._free)

    def grow(self, request: Request, upto: int) -> bool:
        """A row is all that a request ever needs: the first call takes it, the others find it."""
        if request.id not in self._rows:
            if not self._free:
                return False
            self._rows[request.id] = self._free.pop()
            self._stored[request.id] = 0
        return upto <= self.row_length

    def commit(self, request: Request, upto: int) -> None:
        request.num_computed_tokens = upto
        self._stored[request.id] = upto

    def block_table(self, request: Request) -> Sequence[int]:
        return (self._rows[request.id],)

    def free(self, request: Request) -> None:
        if request.id in self._rows:
            self._free.append(self._rows.pop(request.id))
            del self._stored[request.id]

    def usage(self) -> KVUsage:
        return KVUsage(
            capacity=self.num_rows * self.row_length,
            reserved=len(self._rows) * self.row_length,
            stored=sum(self._stored.values()),
        )

    def check_integrity(self) -> None:
        rows = self._free + list(self._rows.values())
        assert sorted(rows) == list(range(self.num_rows)), f"rows lost or owned twice: {sorted(rows)}"
        assert self._rows.keys() == self._stored.keys()
