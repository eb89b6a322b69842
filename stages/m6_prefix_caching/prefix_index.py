"""What the cache asks of an index over full blocks. Two answers: a chain of hashes, and a tree."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from weakref import WeakValueDictionary

Tokens = tuple[int, ...]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Entry:
    """A full block: `tokens`, after all the tokens that `parent` stands for, have their keys and values in `block`.

    K and V of a token depend on all tokens before it. So a block is identified by its tokens *and its parent*, which
    is identified in the same way, down to a root that belongs to one cache salt. Nothing else changes K and V here:
    one engine has one model, one dtype, and no adapters.
    """

    parent: Entry | None  # None: a root, which stands for no tokens and has no block
    tokens: Tokens
    block: int
    key: int = 0  # hash index: of the parent's key and the tokens
    children: list[Entry] | None = None  # radix index: sorted by their tokens; None: none so far, or the hash index
    step: int = 0  # the plan that registered it: its content is there when that step has run
    hits: int = 0  # requests that started with this block


class PrefixIndex(abc.ABC):
    """Finds the block that continues a known beginning. Never wrong: tokens and parents are compared, not hashes."""

    def __init__(self) -> None:
        self._roots: WeakValueDictionary[str | None, Entry] = WeakValueDictionary()  # a root goes with its last child

    def root(self, salt: str | None) -> Entry:
        """Where prompts with this salt begin. Different salts share nothing."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Entry(None, (), block=-1, key=hash(salt))
        return root

    @abc.abstractmethod
    def find(self, parent: Entry, tokens: Tokens) -> Entry | None:
        """The entry with exactly these tokens after `parent`."""

    @abc.abstractmethod
    def add(self, parent: Entry, tokens: Tokens, block: int) -> Entry | None:
        """The entry that `find` finds or, where there is none, a new one for `block`. None: no place in the index."""

    @abc.abstractmethod
    def remove(self, entry: Entry) -> None:
        """The block gets other content. Entries leave before their parents."""

    def closest(self, parent: Entry, tokens: Tokens, before: int) -> tuple[Entry, int] | None:
        """The entry after `parent` that has the most first tokens in common with these, and how many, of those that
        were registered before step `before`. None where the index cannot look inside blocks."""
        return None

    def clear(self) -> None:
        self._roots.clear()
