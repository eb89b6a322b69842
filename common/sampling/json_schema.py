"""JSON schemas as they are enforced: whatever fits must validate, also with names that are escaped or written twice."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAPS, LISTS = (
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"),
    ("anyOf", "oneOf", "allOf"),
)
SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
COMBINING = {"allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas", "dependencies"}
OF_OBJECTS = {"properties", "required", "patternProperties", "additionalProperties", "unevaluatedProperties",
              "propertyNames", "minProperties", "maxProperties", "dependentRequired", "if", "not", "$dynamicRef",
              "dependentSchemas", "dependencies"}  # fmt: skip
FORMATS = {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
"""That are enforced; others are annotations."""


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it, and those that it refers to, once each."""
    left, seen = [schema], set[int]()
    while left:
        one: Any = left.pop()
        if isinstance(one, dict) and id(one) not in seen:  # pyright: ignore
            seen.add(id(one))  # pyright: ignore
            yield one  # pyright: ignore
            held: list[Any] = [one.get(key) for key in SINGLE]  # pyright: ignore
            for key in (*LISTS, "prefixItems"):
                held += one[key] if isinstance(one.get(key), list) else []  # pyright: ignore
            for key in MAPS:
                held += one[key].values() if isinstance(one.get(key), dict) else []  # pyright: ignore
            left += [*held, _target(schema, one.get("$ref"))]  # pyright: ignore


def _target(schema: Any, reference: Any) -> Any:
    """What a reference such as "#/$defs/x" points to; None if that is not in this document."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        schema = schema.get(name) if isinstance(schema, dict) else None  # pyright: ignore
    return schema  # pyright: ignore


def _combined(part: dict[str, Any]) -> bool:
    """Is an object described in several places at once, which then have to be open?"""
    combining = part.keys() & COMBINING
    several = len(combining) > 1 or (isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1)
    return bool(combining) and (several or bool(part.keys() & OF_OBJECTS))


def closed(schema: Any) -> Any:
    """A copy in which objects that list `properties`, and say nothing of others, have no others: a small model would go
    on writing names of its own. Not where schemas are combined, whose parts have to be open. Raises `ValueError` for
    what cannot be held to."""
    try:
        schema = copy.deepcopy(schema)
    except RecursionError:
        raise ValueError("recursion: it is nested too deeply") from None
    found = list(parts(schema))
    combined = any(map(_combined, found))
    for part in found:
        named, required = part.get("properties"), part.get("required", [])
        part.pop("x-guidance", None)  # the library's own switches
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            del part["format"]
        lists_all = isinstance(named, dict) and isinstance(required, list) and all(str(n) in named for n in required)  # pyright: ignore
        if lists_all and not combined and not part.keys() & (OF_OBJECTS - {"properties", "required", "maxProperties"}):
            part["additionalProperties"] = False
        least: Any = part.get("minProperties", 0)
        if isinstance(least, int | float) and isinstance(required, list) and least > max(1, len(required)):  # pyright: ignore
            raise ValueError("minProperties counts names that may be written twice: list them as required")
    return schema


def ambiguous(schema: Any) -> bool:
    """May an object have other names than those listed? Then one of them, spelled with an escape, could be listed."""
    return any(
        part.get("patternProperties") or (part.get("properties") and part.get("additionalProperties") is not False)
        for part in parts(schema)
    )


def documents(grammar: str) -> Iterator[Any]:
    """The schemas in a grammar of Lark."""
    for found in re.finditer(r"%json\s*(?=\{)", grammar):
        with contextlib.suppress(ValueError, RecursionError):  # text that only looks like one
            yield json.JSONDecoder().raw_decode(grammar, found.end())[0]


class Names:
    """Follows the text of JSON: is what comes next inside an object's name?"""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = self._escaped = self._is_name = self._awaited = False

    @property
    def inside(self) -> bool:
        return self._in_string and self._is_name

    def feed(self, text: str) -> None:
        for letter in text:
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string, self._is_name = True, self._awaited
            elif letter in "{[":
                self._open.append(letter)
                self._awaited = letter == "{"
            elif letter in "}]":
                del self._open[-1:]
                self._awaited = False
            elif letter in ",:":
                self._awaited = letter == "," and self._open[-1:] == ["{"]


def prepared(text: str) -> str:
    """The same of a schema's JSON."""
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError("recursion: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error) if isinstance(error, json.JSONDecodeError) else "number out of range") from None
    return json.dumps(closed(schema), ensure_ascii=False)
