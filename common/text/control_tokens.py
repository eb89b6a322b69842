"""Control tokens spelled in what a chat is given are encoded as text: no user can end a turn or begin one.

Those that count are the ones that the template writes. Before it renders, each control token in a given string gets
marks around it: private-use characters that the chat does not have. A string that begins or ends with a piece of one
gets a mark there, because two strings may meet. In the result, a control token with its marks, or with one inside, is
text, and the marks are taken out. So templates can still look for a token in a content, and split or cut it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer as FastTokenizer

from common.errors import require


class Marks(NamedTuple):
    begin: str
    end: str
    broken: str  # beside a piece of a token


class ControlTokens:
    """The special tokens; and those other added tokens which the template writes and does not look for. An assistant's
    messages may hold the latter: they are the model's own, and readable in its answers."""

    def __init__(self, backend: FastTokenizer, template: str) -> None:
        added = [t for t in backend.get_added_tokens_decoder().values() if t.content.strip()]
        self._special = _Finder(t.content for t in added if t.special)
        self._all = _Finder(t.content for t in added if t.special or _is_written(t.content, template))
        self._in_template = set(template)

    def marks(self, given: object) -> Marks | None:
        """Marks for what a chat is given; None where none are needed."""
        texts = list(_texts(given))
        if not any(map(self._all.is_in, texts)):
            return None
        taken = self._in_template.union(*texts)
        free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in taken][:3]
        require(len(free) == 3, "a chat must not hold all of Unicode's private-use characters")
        return Marks(*free)

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy of messages, tools or variables, with marks."""
        return self._mark(value, marks, self._all)

    def _mark(self, value: Any, marks: Marks, finder: "_Finder") -> Any:
        if isinstance(value, str):
            return finder.mark(value, marks)
        if isinstance(value, Mapping):
            finder = self._special if value.get("role") == "assistant" else finder  # pyright: ignore
            items: Iterable[tuple[Any, Any]] = value.items()  # pyright: ignore
            return {self._mark(k, marks, finder): v if k == "role" else self._mark(v, marks, finder) for k, v in items}
        return [self._mark(item, marks, finder) for item in value] if isinstance(value, list | tuple) else value  # pyright: ignore

    def split(self, rendered: str, marks: Marks) -> list[str]:
        """The text without marks, as [text, spelled token, text, ...]."""
        for mark in marks:  # `tojson` may have escaped them
            rendered = rendered.replace(f"\\u{ord(mark):04x}", mark)
        parts = re.split(f"([{''.join(marks)}])", rendered)
        places: dict[str, set[int]] = {mark: set() for mark in marks}
        length = 0
        for part in parts:
            if part in places:
                places[part].add(length)
            else:
                length += len(part)
        text, inside = "".join(parts[::2]), set[int]().union(*places.values())
        pieces, at = [""], 0
        for start, end in self._all.spans(text):
            if start in places[marks.begin] or end in places[marks.end] or not inside.isdisjoint(range(start + 1, end)):
                pieces[-1:] = [text[at:start], text[start:end], ""]
                at = end
        return [*pieces[:-1], text[at:]]


class _Finder:
    """Of texts in a text, in capitals or not: a template may change that."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text.lower() for text in texts}
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        heads = sorted({re.escape(text[:2]) for text in self._texts}, key=len, reverse=True)
        self._head = re.compile("|".join(heads) or "(?!)", re.IGNORECASE)
        self._beginnings = {text[:n] for text in self._texts for n in range(1, len(text))}
        self._ends = {text[n:] for text in self._texts for n in range(1, len(text))}

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of each, the longest first."""
        at = 0
        while head := self._head.search(text, at):
            start = head.start()
            length = next((n for n in self._lengths if text[start : start + n].lower() in self._texts), 0)
            at = start + (length or 1)
            if length:
                yield start, at

    def is_in(self, text: str) -> bool:
        return any(self._broken(text)) or next(self.spans(text), None) is not None

    def _broken(self, text: str) -> tuple[bool, bool]:
        """Does it begin with the end of one? Does it end with the beginning of one?"""
        lengths = range(1, min(len(text) + 1, self._lengths[0] if self._lengths else 0))
        return any(text[:n].lower() in self._ends for n in lengths), any(
            text[-n:].lower() in self._beginnings for n in lengths
        )

    def mark(self, text: str, marks: Marks) -> str:
        pieces, at = list[str](), 0
        for start, end in self.spans(text):
            pieces += text[at:start], marks.begin, text[start:end], marks.end
            at = end
        before, behind = self._broken(text)
        return marks.broken * before + "".join(pieces) + text[at:] + marks.broken * behind


def _is_written(token: str, template: str) -> bool:
    """By the template, which does not look for it in a content, as for `</think>`. No word, no space."""
    quoted = f"""['"]{re.escape(token)}['"]"""
    looks = rf"\w\(\s*{quoted}|{quoted}\s+(not\s+)?in\b|[=!]=\s*{quoted}"
    return token in template and not (token[0].isalnum() or token[0].isspace() or re.search(looks, template))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.items() if isinstance(value, Mapping) else value:  # pyright: ignore
            yield from _texts(item)


def encode_as_text(backend: FastTokenizer, text: str, control_ids: Sequence[int]) -> list[int]:
    """Token ids as if no token had been added to the vocabulary."""
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    splits = [normal]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
    ids = [token.id for split in splits for token in backend.model.tokenize(split)]
    if not set(ids).isdisjoint(control_ids) and len(text) > 1:  # the vocabulary itself may have it, in one piece
        return [token_id for part in (text[:-1], text[-1:]) for token_id in encode_as_text(backend, part, control_ids)]
    return ids
