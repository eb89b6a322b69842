"""JSON schemas as they are enforced: whatever fits must validate, also with names that are escaped or written twice."""

import copy
import json
from collections.abc import Iterator
from typing import Any

MAPS, LISTS = (
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"),
    ("anyOf", "oneOf", "allOf"),
)
SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties", "allOf",
        "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas", "dependentRequired", "dependencies",
        "const", "enum"}  # fmt: skip
"""An object's schema with one of these may want names beyond its `properties`, or speaks of others itself."""
FORMATS = {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
"""That are enforced; others are annotations."""


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it."""
    left = [schema]
    while left:
        one: Any = left.pop()
        if isinstance(one, dict):
            yield one  # pyright: ignore
            held: list[Any] = [one.get(key) for key in SINGLE]  # pyright: ignore
            for key in (*LISTS, "prefixItems"):
                held += one[key] if isinstance(one.get(key), list) else []  # pyright: ignore
            for key in MAPS:
                held += one[key].values() if isinstance(one.get(key), dict) else []  # pyright: ignore
            left += held


def closed(schema: Any) -> Any:
    """A copy in which objects that list `properties`, and say nothing of others, have no others: a small model would go
    on writing names of its own. Not where schemas are combined, whose parts have to be open. Raises `ValueError` for
    what cannot be held to."""
    try:
        schema = copy.deepcopy(schema)
    except RecursionError:
        raise ValueError("recursion: it is nested too deeply") from None
    found = list(parts(schema))
    combined = any("allOf" in part or ("$ref" in part and "properties" in part) for part in found)
    for part in found:
        named, required = part.get("properties"), part.get("required", [])
        part.pop("x-guidance", None)  # the library's own switches
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            del part["format"]
        lists_all = isinstance(named, dict) and isinstance(required, list) and all(str(n) in named for n in required)  # pyright: ignore
        if lists_all and not combined and not part.keys() & OPEN:
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


def prepared(text: str) -> str:
    """The same of a schema's JSON."""
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError("recursion: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error) if isinstance(error, json.JSONDecodeError) else "number out of range") from None
    return json.dumps(closed(schema), ensure_ascii=False)
