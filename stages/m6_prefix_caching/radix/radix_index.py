"""A tree, as SGLang's RadixAttention has it: prompts that begin alike share a path from the root.

A node is one block; a run of nodes without branches is drawn as one (`make stage6 trace`), where SGLang also stores
it as one. A node's children are sorted by their tokens. So the child that has the most first tokens in common with a
prompt is next to the place where the prompt itself would be: a match may end inside a block.
"""

from bisect import bisect_left
from operator import attrgetter

from stages.m6_prefix_caching.prefix_index import Entry, PrefixIndex, Tokens

_tokens = attrgetter("tokens")


class RadixIndex(PrefixIndex):
    """O(log children) for each block; the keys are the tokens themselves, so that there is nothing to verify."""

    def find(self, parent: Entry, tokens: Tokens) -> Entry | None:
        children = parent.children or []
        at = bisect_left(children, tokens, key=_tokens)
        return children[at] if at < len(children) and children[at].tokens == tokens else None

    def add(self, parent: Entry, tokens: Tokens, block: int) -> Entry | None:
        if parent.children is None:
            parent.children = []
        at = bisect_left(parent.children, tokens, key=_tokens)
        if at == len(parent.children) or parent.children[at].tokens != tokens:
            parent.children.insert(at, Entry(parent, tokens, block))
        return parent.children[at]

    def remove(self, entry: Entry) -> None:
        assert entry.parent is not None and entry.parent.children is not None
        del entry.parent.children[bisect_left(entry.parent.children, entry.tokens, key=_tokens)]

    def closest(self, parent: Entry, tokens: Tokens, before: int) -> tuple[Entry, int] | None:
        children = parent.children or []
        at = bisect_left(children, tokens, key=_tokens)
        neighbours = [entry for entry in children[max(0, at - 1) : at + 1] if entry.step < before]
        if not neighbours:
            return None
        best = max(neighbours, key=lambda entry: _common(entry.tokens, tokens))
        return best, _common(best.tokens, tokens)


def _common(one: Tokens, other: Tokens) -> int:
    """How many first tokens are the same."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))
