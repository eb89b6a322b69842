"""Control tokens spelled in what a chat is given are encoded as text: no user can end a turn or begin one.

Those that count are the ones that the template writes. Before it renders, each control token in a given string gets
marks around it: private-use characters that the chat does not have. A string that begins or ends with a piece of one
gets a mark there, because two strings may meet. In the result, a control token with its marks, or with one inside, is
text, and the marks are taken out. So templates can still look for a token in a content, and split or cut it.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from common.errors import require

Marks = tuple[str, str, str]
"""Before a token, behind it, and beside a piece of one."""


class ControlTokens:
    """The special tokens; and those other added tokens which the template writes and does not look for. An assistant's
    messages may hold the latter: they are the model's own, and readable in its answers."""

    def __init__(self, backend: FastTokenizer, template: str) -> None:
        added = [token for token in backend.get_added_tokens_decoder().values() if token.content.strip()]
        self._special = _Finder(token.content for token in added if token.special)
        self._all = _Finder(t.content for t in added if t.special or _is_written(t.content, template))
        self._template = template

    def marks(self, given: object) -> Marks | None:
        """Marks for what a chat is given; None where none are needed."""
        texts = list(_texts(given))
        if not any(any(self._all.broken(text)) or any(True for _ in self._all.spans(text)) for text in texts):
            return None
        taken = set(self._template).union(*texts)
        free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in taken]
        require(len(free) > 2, "a chat must not hold all of Unicode's private-use characters")
        return free[0], free[1], free[2]

    def mark(self, value: Any, marks: Marks, finder: "_Finder | None" = None) -> Any:
        """A copy of messages, tools or variables, with marks."""
        finder = finder or self._all
        if isinstance(value, str):
            return finder.mark(value, marks)
        if isinstance(value, list | tuple):
            return [self.mark(item, marks, finder) for item in value]  # pyright: ignore
        if not isinstance(value, Mapping):
            return value
        items: Mapping[Any, Any] = value
        finder = self._special if items.get("role") == "assistant" else finder
        return {
            self.mark(k, marks, finder): v if k == "role" else self.mark(v, marks, finder) for k, v in items.items()
        }

    def split(self, rendered: str, marks: Marks) -> list[str]:
        """The text without marks, as [text, spelled token, text, ...]."""
        for mark in marks:  # `tojson` may have escaped them
            rendered = rendered.replace(f"\\u{ord(mark):04x}", mark)
        parts = re.split(f"([{''.join(marks)}])", rendered)
        text, ends = "".join(parts[::2]), accumulate(map(len, parts[::2]))
        places = list(zip(parts[1::2], ends, strict=False))
        before, behind = ({at for mark, at in places if mark == wanted} for wanted in marks[:2])
        inside, pieces, at = {at for _, at in places}, list[str](), 0
        for start, end in self._all.spans(text):
            if start in before or end in behind or not inside.isdisjoint(range(start + 1, end)):
                pieces += text[at:start], text[start:end]
                at = end
        return [*pieces, text[at:]]


class _Finder:
    """Of texts in a text, in capitals or not: a template may change that."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted({text.lower() for text in texts})
        self._reversed = sorted(text[::-1] for text in self._texts)
        self._set, self._lengths = set(self._texts), sorted({len(text) for text in self._texts}, reverse=True)
        heads = sorted({re.escape(text[:2]) for text in self._texts}, key=len, reverse=True)
        self._head = re.compile("|".join(heads) or "(?!)", re.IGNORECASE)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of each, the longest first."""
        at = 0
        while head := self._head.search(text, at):
            start = head.start()
            length = next((n for n in self._lengths if text[start : start + n].lower() in self._set), 0)
            at = start + (length or 1)
            if length:
                yield start, at

    def broken(self, text: str) -> tuple[bool, bool]:
        """Does it begin with the end of one? Does it end with the beginning of one?"""
        sizes = range(1, min(len(text) + 1, self._lengths[0] if self._lengths else 0))
        begins = any(_starts_one(self._reversed, text[:n].lower()[::-1]) for n in sizes)
        return begins, any(_starts_one(self._texts, text[-n:].lower()) for n in sizes)

    def mark(self, text: str, marks: Marks) -> str:
        before, behind, broken = marks
        pieces, at = list[str](), 0
        for start, end in self.spans(text):
            pieces += text[at:start], before, text[start:end], behind
            at = end
        begins, ends = self.broken(text)
        return broken * begins + "".join(pieces) + text[at:] + broken * ends


def _starts_one(texts: list[str], piece: str) -> bool:
    at = bisect_left(texts, piece)
    return at < len(texts) and texts[at].startswith(piece)


def _is_written(token: str, template: str) -> bool:
    """By the template, which does not look for it in a content, as for `</think>`. No word, no space."""
    quoted = f"""['"]{re.escape(token)}['"]"""
    looks = rf"\w\(\s*{quoted}|{quoted}\s+(not\s+)?in\b|[=!]=\s*{quoted}"
    return token in template and not (token[0].isalnum() or token[0].isspace() or re.search(looks, template))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.items() if isinstance(value, Mapping) else value:  # pyright: ignore
            yield from _texts(item)


def encode_as_text(backend: FastTokenizer, text: str, control_ids: Sequence[int]) -> list[int]:
    """Token ids as if no token had been added to the vocabulary."""
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    splits = [(normal, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normal)
    ids = [token.id for split, _ in splits for token in backend.model.tokenize(split)]
    if not set(ids).isdisjoint(control_ids) and len(text) > 1:  # the vocabulary itself may have it, in one piece
        return [token_id for part in (text[:-1], text[-1:]) for token_id in encode_as_text(backend, part, control_ids)]
    return ids
