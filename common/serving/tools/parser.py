"""Calls in an answer, found as its text comes."""

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from typing import Any

Piece = str | dict[str, Any]
"""Content, or an entry of `tool_calls` as OpenAI streams them: first id and name, then more of the arguments."""

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=float)  # Python reads no integer of 5,000 digits


class ToolParser(ABC):
    """One answer's. Text that is no call of a tool that was given, such as broken JSON, stays content.

    eager: arguments leave as they come, before it is known whether they are whole. parallel: more than one call.
    named: `tool_choice` names the tool. before, key, after, between: how the family writes calls that are enforced.
    """

    before: str = ""
    key: str = "arguments"
    after: str = ""
    between: str

    def __init__(self, names: Collection[str], parallel: bool = True, eager: bool = False, named: bool = False) -> None:
        self._names, self._parallel, self._eager, self._named = tuple(names), parallel, eager, named
        self.calls = 0
        self.plain = False  # there was content since the last call
        self._held = ""
        self._is_whole = False  # its JSON; but it may not be closed
        self._begun = False  # has the call at the front of `_held` a name yet?
        self._sent = 0  # characters of its arguments

    @property
    def reason(self) -> str:
        """Of an answer that has ended by itself; as OpenAI has it, `stop` where `tool_choice` named the tool."""
        return "tool_calls" if self.calls and not self._named else "stop"

    @abstractmethod
    def _find(self, held: str, end: bool) -> tuple[int, int | None]:
        """How much of the text is content, and where a call's JSON begins behind it."""

    @abstractmethod
    def _end(self, held: str, stop: int | None, wrong: int, end: bool) -> int | None:
        """Where a call ends whose JSON ends at `stop`, or (None) is no JSON from `wrong` on; None if more may come."""

    def feed(self, text: str, end: bool = False) -> Iterator[Piece]:
        """`end`: that was all."""
        self._held += text
        while self._held:
            if self.calls and not self.plain and not self._begun:
                self._held = self._held.lstrip()  # behind a call
            content, at = self._find(self._held, end)
            if at is not None or not end or self.calls:
                content = len(self._held[:content].rstrip())  # space before a call is not content
            if content:
                self.plain = True
                yield self._held[:content]
            self._held = self._held[content:]
            if at is None:
                return
            done = yield from self._call(at - content, end, may_end=end or "}" in text)
            if not done:
                return

    def _call(self, at: int, end: bool, may_end: bool) -> Generator[Piece, None, bool]:
        """The call at the front of what is held; returns whether it has ended."""
        held = self._held
        found, stop, wrong = _decode(held, at) if may_end or self._is_whole else (None, None, len(held))
        self._is_whole = stop is not None
        until = self._end(held, stop, wrong, end)
        arguments = None if stop is None else self._arguments(found, held, at, stop)
        head = HEAD.match(held, at) if self._eager else None
        if until is None and head and arguments is None and head[1] in self._names:
            arguments = held[head.end() :].rstrip(" \t\r\n}")  # what may be the end of the call waits
        elif until is not None and self._begun and arguments is None and head:
            arguments = held[head.end() : until]
        if arguments is not None and (until is not None or head):
            yield from self._gained(head[1] if head else (found or {}).get("name", ""), arguments)
        if until is None:
            return False
        if arguments is None:
            self.plain = True
            yield held[:until]
        else:
            self.calls, self.plain = self.calls + 1, False
        self._held, self._begun, self._is_whole, self._sent = held[until:], False, False, 0
        return True

    def _gained(self, name: str, arguments: str) -> Iterator[Piece]:
        if self.calls and not self._parallel:
            return
        if not self._begun:
            self._begun = True
            function = {"name": name, "arguments": ""}
            yield {"index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        if len(arguments) > self._sent:
            yield {"index": self.calls, "function": {"arguments": arguments[self._sent :]}}
            self._sent = len(arguments)

    def _arguments(self, call: Any, held: str, at: int, stop: int) -> str | None:
        """As the model wrote them; None if it is no call."""
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return None
        given = call.get("arguments", call.get("parameters"))
        for key in ARGUMENTS.finditer(held, at, stop) if isinstance(given, dict) else ():
            value, end, _ = _decode(held, key.end())
            if value == given and end is not None:
                return held[key.end() : end]
        return None


def _decode(text: str, at: int) -> tuple[Any, int | None, int]:
    """The JSON value at a place, and where it ends; None for both if it does not, and from where on it is none."""
    try:
        at += len(text[at:]) - len(text[at:].lstrip())
        return *DECODER.raw_decode(text, at), at
    except json.JSONDecodeError as error:
        return None, None, len(text) if "Unterminated" in error.msg else error.pos
    except (ValueError, RecursionError):
        return None, None, at
