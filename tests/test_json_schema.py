"""What a schema becomes before it is enforced."""

from __future__ import annotations

from typing import Any

import pytest

from common.sampling.json_schema import Names, ambiguous, closed, documents, prepared

A: dict[str, Any] = {"properties": {"a": {"type": "integer"}}}
NO_MORE = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, A | NO_MORE),
        ({"items": A}, {"items": A | NO_MORE}),
        ({"$defs": {"x": A}, "anyOf": [A, {"$ref": "#/$defs/x"}]},
         {"$defs": {"x": A | NO_MORE}, "anyOf": [A | NO_MORE, {"$ref": "#/$defs/x"}]}),
        ({"properties": {"properties": A}}, {"properties": {"properties": A | NO_MORE}} | NO_MORE),
        ({"const": A}, {"const": A}),
        ({"allOf": [{"$ref": "#/components/x"}], "components": {"x": A}},
         {"allOf": [{"$ref": "#/components/x"}], "components": {"x": A | NO_MORE}}),
        ({"type": "string", "format": "binary", "x-guidance": {"lenient": True}}, {"type": "string"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
    ],
)  # fmt: skip
def test_objects_that_say_nothing_of_others_are_closed(schema: Any, expected: Any) -> None:
    before = repr(schema)
    assert closed(schema) == expected and repr(schema) == before
    assert not ambiguous(closed(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [A, {"properties": {"b": {}}}]},
        {"$ref": "#/$defs/x", "properties": {"b": {}}, "$defs": {"x": A}},
        A | {"additionalProperties": {"type": "null"}},
        A | {"required": ["b"]},
        A | {"anyOf": [{"required": ["b"]}]},
        A | {"required": ["a"], "oneOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"$ref": "#/$defs/x", "required": ["b"], "$defs": {"x": A}},
        {"patternProperties": {"^b": {}}, "$ref": "#/$defs/x", "$defs": {"x": A}},
        {"patternProperties": {"^a": {}}},
    ],
)
def test_those_that_are_combined_stay_open_and_are_known_to_be(schema: Any) -> None:
    assert closed(schema) == schema and ambiguous(schema)


@pytest.mark.parametrize("text", ["true", "[]", "3", '{"type": "object"}', '{"minProperties": 1}'])
def test_what_lists_no_names_is_left_alone(text: str) -> None:
    assert prepared(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "Expecting"), ('{"minProperties": 2}', "minProperties"), ("9" * 5000, "out of range"),
     ('{"items":' * 100_000, "recursion")],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        prepared(text)


def test_schemas_in_a_grammar_are_found_however_they_are_written() -> None:
    grammar = 'start: "<" %json {"a":\n {"b": 1}} ">" // %json { broken\nx: "%json x" %json {} | %json'
    assert list(documents(grammar)) == [{"a": {"b": 1}}, {}]


def test_names_are_told_from_other_strings() -> None:
    names, inside = Names(), ""
    for letter in '{"a\\"b": ["c", {"d": "e,\\""}, "f"], "g" : {}, "h":"i"}':
        inside += letter if names.inside else " "
        names.feed(letter)
    assert inside.split() == ['a\\"b"', 'd"', 'g"', 'h"']
