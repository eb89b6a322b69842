"""KV memory as it changes: what a picture has to draw anew after a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.kv_cache import Region


class MemoryMap:
    """Knows what it has told. `answer`: the number of each request; those of nobody's (a prefix cache keeps blocks
    whose requests have ended) have no owner."""

    def __init__(self, answer: Mapping[str, int]) -> None:
        self._answer = answer
        self._told: dict[int, tuple[int, int, tuple[int, ...]]] = {}

    def changes(self, regions: Iterable[Region]) -> dict[str, Any]:
        """`set`: [start, length, stored, owners] of regions that are new or otherwise than before; `free`: starts of
        those that are gone. In token slots."""
        now = {
            region.start: (region.length, region.stored, tuple(self._answer.get(id, -1) for id in region.owners))
            for region in regions
        }
        changed = [[start, *what] for start, what in now.items() if self._told.get(start) != what]
        gone = [start for start in self._told if start not in now]
        self._told = now
        return {"set": changed, "free": gone}
