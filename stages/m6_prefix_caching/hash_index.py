"""A chain of hashes, as vLLM's automatic prefix caching has it: one dictionary for all blocks of all prompts."""

from collections.abc import Callable

from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex, Tokens

HashBlock = Callable[[int, Tokens], int]


def chain_hash(parent_key: int, tokens: Tokens) -> int:
    """64 bits that depend on the block's tokens and, through the parent's key, on all tokens before them. O(block),
    however long the prompt is. Python's own hash takes a tenth of the time of a cryptographic one; since every hit is
    compared with its tokens, a collision costs a hit and never an answer."""
    return hash((parent_key, tokens))


class HashIndex(PrefixIndex):
    """Entries by key. Where two contents have the same key, the first one keeps the place."""

    def __init__(self, hash_block: HashBlock = chain_hash) -> None:
        super().__init__()
        self._hash = hash_block
        self._entries: dict[int, Entry] = {}

    def find(self, parent: Entry, tokens: Tokens) -> Entry | None:
        entry = self._entries.get(self._hash(parent.key, tokens))
        return entry if entry is not None and _is(entry, parent, tokens) else None

    def add(self, parent: Entry, tokens: Tokens, block: int) -> Entry | None:
        key = self._hash(parent.key, tokens)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(parent, tokens, block, key)
            return entry
        return entry if _is(entry, parent, tokens) else None

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.key]

    def clear(self) -> None:
        super().clear()
        self._entries.clear()


def _is(entry: Entry, parent: Entry, tokens: Tokens) -> bool:
    """Equal parents are the same object, so that this compares the whole prefix in the time of one block."""
    return entry.parent is parent and entry.tokens == tokens
