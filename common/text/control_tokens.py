"""Control tokens spelled in what a chat is given are encoded as text: no user can end a turn or begin one.

Before the template renders, each control token in a given string gets marks around it: private-use characters that the
chat does not have. A string that may be a piece of one gets marks at its ends, because strings may meet. The rendered
text, without its marks, is then encoded by the library, which tells what it took for a control token. One that has
marks, or one inside, is text. So is one that is not spelled as itself, but turned into it by the tokenizer's
normalizer: templates write their tokens as they are. Templates can still look for a token in a content, and split it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, islice
from typing import Any, cast

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from common.errors import require
from common.text.turn_ends import TURN_ENDS

Marks = str
"""Three characters: before a token, behind it, and beside a piece of one."""
PRIVATE = range(0xE000, 0xF900)
Touched = Callable[[int, int], bool]
"""Does the part of the rendered text from here to there have marks?"""

BRACKETS = ("<>", "[]", "||", "{}")  # around tokens that are no text, whether or not they are marked as special
EDGES = "<>[]{}|｜/"
WORDS = re.compile(r"[\w\s]+|.")  # some vocabularies have letters and words as added tokens
UNKNOWN = re.compile(r"\W*unk(nown)?\W*", re.IGNORECASE)  # the library's answer to what no token spells
HTML = re.compile(
    "</?(h[1-6]|table|caption|t(head|body|foot|[rhd])|blockquote|strong|em|code|su[bp]|[biup]|br|[ou]l|li)>"
)
READABLE = re.compile(
    r"</?(think|thinking|thought|reasoning|tool_calls?|tool_response|function_call|arg_key|arg_value)>"
    r"|\[/?(THINK|TOOL_CALLS|ARGS)\]|<\|/?tool_calls?\|>|<｜tool▁(calls?▁(begin|end)|sep)｜>"
)
"""What models write into their answers, and clients send back as the assistant's: none of these is a turn."""


class ControlTokens:
    """All special tokens; of the others, those that the template writes, and those in brackets that are not HTML. An
    assistant's messages may hold the `READABLE` of these others."""

    def __init__(self, backend: FastTokenizer, template: str, variables: Iterable[str]) -> None:
        """variables: texts that a template may write besides its own, such as its `eos_token`."""
        variables = [*variables]
        added = [(i, t.content, t.special) for i, t in backend.get_added_tokens_decoder().items() if t.content.strip()]
        special = {text for _, text, is_special in added if is_special}.union(variables, TURN_ENDS)
        self._tokens = {i: text for i, text, _ in added if text in special or not WORDS.fullmatch(text)}
        self._unknown = {getattr(backend.model, "unk_token", None), *filter(UNKNOWN.fullmatch, special)}
        self._readable = {text for text in self._tokens.values() if READABLE.fullmatch(text)} - special
        texts, self._written = set(self._tokens.values()), "\0".join([template, *variables])
        bracketed = {text for text in texts if f"{text[0]}{text[-1]}" in BRACKETS and not HTML.fullmatch(text)}
        self._control = texts & special | bracketed | {text for text in texts if text in self._written}
        self._all, self._unreadable = _Finder(texts), _Finder(texts - self._readable)
        self._backend = backend

    def marks(self, given: tuple[object, ...]) -> Marks | None:
        """Marks for what a chat is given; None where none are needed."""
        if self.mark(given, "...", strict=True) == [*given]:
            return None
        taken = ascii((given, self._written))  # where a private-use character has the form that `tojson` gives it
        free = "".join(islice((mark for mark in map(chr, PRIVATE) if _escaped(mark) not in taken), 3))
        require(len(free) == 3, "a chat must not hold all of Unicode's private-use characters")
        return free

    def mark(self, value: Any, marks: Marks, strict: bool, readable: bool = False) -> Any:
        """A copy of messages, tools or variables, with marks. Not strict: fewer of them, where templates look for what
        can begin no turn. readable: it is an assistant's."""
        if isinstance(value, str):
            return (self._unreadable if readable or not strict else self._all).mark(value, marks, strict)
        if isinstance(value, list | tuple):
            return [self.mark(item, marks, strict, readable) for item in value]  # pyright: ignore
        if not isinstance(value, Mapping):
            return value
        items, copy = cast("Mapping[Any, Any]", value), dict[Any, Any]()
        readable = readable or items.get("role") == "assistant"
        for key, item in items.items():
            if not (key in ("role", "type") and _is_name(item)):  # templates compare these, and build tokens of them
                item = self.mark(item, marks, strict, readable and key not in ("tool_calls", "function_call"))
            copy[self.mark(key, marks, strict) if isinstance(key, str) and not _is_name(key) else key] = item
        return copy

    def unmark(self, rendered: str, marks: Marks) -> tuple[str, Touched]:
        """The text without marks, and where they were."""
        for mark in marks:  # `tojson` may have escaped them
            rendered = rendered.replace(_escaped(mark), mark)
        parts = re.split(f"([{marks}])", rendered)
        places = list(zip(parts[1::2], accumulate(map(len, parts[::2])), strict=False))
        first, last = {at: mark for mark, at in reversed(places)}, {at: mark for mark, at in places}
        inside = [at for _, at in places]

        def touched(start: int, end: int) -> bool:
            near = last.get(start) == marks[0] or first.get(end) == marks[1]  # not of a token that is taken out
            return near or bisect_right(inside, start) < bisect_left(inside, end)

        return "".join(parts[::2]), touched

    def encode(self, text: str, touched: Touched = lambda start, end: False) -> list[int]:
        """Token ids of a rendered chat."""
        return self._encode(text, 0, len(text), touched, None)

    def _encode(self, text: str, start: int, end: int, touched: Touched, control: set[str] | None) -> list[int]:
        """Of a part of it. control: the tokens that count; None: those known, and all that the template wrote here."""
        encoding, skipped = self._encode_inside(text[start:end]) if start else (self._library(text[:end]), 0)
        ids, found = encoding.ids, list[tuple[str, int, int, bool]]()
        for index in range(skipped, len(ids)):
            content = self._tokens.get(ids[index])
            if content is not None and (span := encoding.token_to_chars(index)):
                first, last = (start + at - (skipped > 0) for at in span)
                at = text[first:last].lower().find(content.lower())
                if at >= 0:
                    first, last = first + at, first + at + len(content)
                elif content in self._unknown:
                    continue
                found.append((content, first, last, at < 0 or touched(first, last)))
        if control is None:
            control = self._control.union(content for content, _, _, given in found if not given)
        result, at = list[int](), start
        for content, first, last, given in found:
            if given and content in control and at <= first < last:
                result += self._encode(text, at, first, touched, control) if at < first else []
                result += self._encode_as_text(text[first:last])
                at = last
        if at == start:
            return ids[skipped:]
        return result + (self._encode(text, at, end, touched, control) if at < end else [])

    def _library(self, text: str) -> Encoding:
        # As a batch of one: the library's `encode` would block all other threads, such as an engine's.
        return self._backend.encode_batch([text], add_special_tokens=False)[0]

    def _encode_inside(self, text: str) -> tuple[Encoding, int]:
        """Of a piece from the middle of a chat, and how many ids to skip: behind a line break, SentencePiece adds no
        space of its own."""
        line, encoding = self._library("\n").ids, self._library(f"\n{text}")
        return (encoding, len(line)) if line and encoding.ids[: len(line)] == line else (self._library(text), 0)

    def _encode_as_text(self, text: str, behind: str = "\n") -> list[int]:
        """Ids of the same, as if no token had been added to the vocabulary."""
        backend, line = self._backend, self._encode_as_text("", "\n") if text and behind else []
        normal = backend.normalizer.normalize_str(behind + text) if backend.normalizer else behind + text
        splits = [(normal, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normal)
        ids = [token.id for split, _ in splits for token in backend.model.tokenize(split)]
        if len(text) > 1 and any(self._tokens.get(i) not in (None, *self._unknown) for i in ids):
            cut = len(text) - 1 if len(text) < 100 else len(text) // 2  # the vocabulary has it in one piece
            return [*self._encode_as_text(text[:cut], behind), *self._encode_as_text(text[cut:], behind)]
        return ids[len(line) :] if ids[: len(line)] == line else self._encode_as_text(text, "")


class _Finder:
    """Of texts in a text, in capitals or not: a template may change that."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted({text.lower() for text in texts})
        self._names = {name for text in self._texts for name in (text.strip(EDGES), *re.split(r"[\W_]+", text)) if name}
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

    def broken(self, text: str, strict: bool) -> tuple[bool, bool]:
        """Does it begin with the end of one? Does it end with the beginning of one? strict: or is it a name in one?"""
        longest = self._lengths[0] if self._lengths else 0
        if strict and len(text) < longest and text.lower() in self._names:
            return True, True
        sizes = range(1, min(len(text) + 1, longest))
        begins = any(_starts_one(self._reversed, text[:n].lower()[::-1]) for n in sizes)
        return begins, any(_starts_one(self._texts, text[-n:].lower()) for n in sizes)

    def mark(self, text: str, marks: Marks, strict: bool) -> str:
        before, behind, broken = marks
        pieces, at = list[str](), 0
        for start, end in self.spans(text):
            pieces += text[at:start], before, text[start:end], behind
            at = end
        begins, ends = self.broken(text, strict)
        return broken * begins + "".join(pieces) + text[at:] + broken * ends


def _starts_one(texts: list[str], piece: str) -> bool:
    at = bisect_left(texts, piece)
    return at < len(texts) and texts[at].startswith(piece)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w -]+", value))


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"
