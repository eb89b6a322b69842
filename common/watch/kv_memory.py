"""What a KV cache shows of itself, for figures and pictures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Token slots: `capacity` in all, `reserved` held by running requests, `stored` filled with a token's K and V.
    `blocks`: what the reserved ones make up: blocks, or whole rows and slots before m3."""

    capacity: int = 0
    reserved: int = 0
    stored: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """`length` neighbouring token slots from `start` on, `stored` of them filled, held by `owners` (request ids)."""

    start: int
    length: int
    stored: int
    owners: tuple[str, ...]


@dataclass(slots=True)
class PrefixStats:
    """What a prefix cache has saved, since `reset_prefix_stats()`. Tokens of prompts, except `recovered`.

    asked: tokens of the requests that started, and saved: those of them that were cached. recovered: tokens that
    preempted requests found again, prompt and output. blocks: taken from the cache at a start. evictions: of cached
    blocks. shared, peak_shared: blocks of several requests, now and at most in one step. cached: blocks in the index.
    """

    asked: int = 0
    saved: int = 0
    recovered: int = 0
    blocks: int = 0
    evictions: int = 0
    shared: int = 0
    peak_shared: int = 0
    cached: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.saved / self.asked if self.asked else None


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """A cached block: its place in the list of all nodes is its number. `parent`: the number of the block before it,
    None for the first one of a prompt. `hits`: requests that started with it; `owners`: requests that hold it now."""

    parent: int | None
    tokens: tuple[int, ...]
    hits: int
    owners: int
