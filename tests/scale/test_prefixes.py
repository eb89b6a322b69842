"""Which replica a request goes to."""

from __future__ import annotations

import json
import random

from common.scale.prefixes import BLOCK, Prefixes, keys_of

IDLE = {"a": 0, "b": 0, "c": 0}


def block_keys(salt: str, prompt: str) -> list[bytes]:
    return keys_of([], json.dumps({"prompt": prompt, "cache_salt": salt}).encode())


def text(seed: int, blocks: float) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=int(blocks * BLOCK)))


def test_keys_are_of_full_blocks_and_depend_on_all_before() -> None:
    one = text(0, 3.5)
    assert len(block_keys("", one)) == 3
    assert block_keys("", one)[:2] == block_keys("", one[: 2 * BLOCK])
    assert block_keys("", "x" + one[1:])[1:] != block_keys("", one)[1:]
    assert set(block_keys("salt", one)).isdisjoint(block_keys("", one))
    assert block_keys("", "\ud800" * BLOCK) and block_keys("s" * 100, one)


def test_the_replica_with_the_longest_beginning_is_first() -> None:
    prefixes = Prefixes()
    long = text(1, 8)
    prefixes.add(block_keys("", long[: 2 * BLOCK]), "a")
    prefixes.add(block_keys("", long), "b")
    assert prefixes.order(block_keys("", long), IDLE) == ["b", "a", "c"]
    assert prefixes.order(block_keys("", long + text(2, 3)), IDLE)[0] == "b"


def test_load_outweighs_a_beginning() -> None:
    """A request in flight costs as much as `request_cost` blocks."""
    prefixes = Prefixes(request_cost=4)
    keys = block_keys("", text(1, 8))
    prefixes.add(keys, "b")
    assert prefixes.order(keys, {"a": 0, "b": 1})[0] == "b"
    assert prefixes.order(keys, {"a": 0, "b": 3})[0] == "a"
    assert prefixes.order([], {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_an_unknown_beginning_has_one_place_and_many_are_spread() -> None:
    firsts = [block_keys("", text(seed, 2)) for seed in range(300)]
    places = [Prefixes().order(keys, IDLE)[0] for keys in firsts]
    assert places == [Prefixes().order(keys, dict(reversed(IDLE.items())))[0] for keys in firsts]
    assert min(places.count(name) for name in IDLE) > 60


def test_what_ended_or_is_old_is_forgotten() -> None:
    prefixes = Prefixes(most=4)
    old, new = block_keys("", text(1, 3)), block_keys("", text(2, 3))
    prefixes.add(old, "a")
    prefixes.add(new, "a")
    assert list(prefixes._holders) == [old[0], *reversed(new)], "last blocks go first"
    assert prefixes.order(old, {"a": 0, "b": 0}) == ["a", "b"], "its first block is remembered"
    assert prefixes.order(new, {"b": 0, "c": 0}) == Prefixes().order(new, {"b": 0, "c": 0}), "a is gone"


def keys(body: bytes, **headers: str) -> list[bytes]:
    return keys_of([(name.encode(), value.encode()) for name, value in headers.items()], body)


def test_a_turn_more_keeps_the_beginning() -> None:
    first = keys(b'{"messages": [{"role": "user", "content": "' + b"x" * 600 + b'"}]}')
    second = keys(b'{"messages": [{"role": "user", "content": "' + b"x" * 600 + b'"}, {"role": "assistant"}]}')
    assert len(first) == 2 and second[:2] == first
    tools = keys(b'{"messages": [{"role": "user", "content": "' + b"x" * 600 + b'"}], "tools": [{}]}')
    assert tools[0] != first[0]


def test_credentials_and_salts_share_nothing() -> None:
    prompt = b'"prompt": "' + b"a" * 300 + b'"'
    firsts = {
        keys(b"{" + prompt + b"}")[0],
        keys(b"{" + prompt + b"}", authorization="Bearer one")[0],
        keys(b"{" + prompt + b"}", authorization="Bearer two")[0],
        keys(b"{" + prompt + b', "cache_salt": "one"}')[0],
        keys(b"{" + prompt + b', "cache_salt": "two"}', authorization="Bearer one")[0],
    }
    assert len(firsts) == 5


def test_any_body_can_be_routed() -> None:
    for body in (b"", b"no JSON", b"[]", b"5", b"null", b'{"prompt": null}', b'{"prompt": 5, "cache_salt": "\\ud800"}',
                 b"[" * 100_000, b"\xff", b'{"messages": {"a": 1}}'):  # fmt: skip
        assert keys(body) == []
    assert len(keys(b'{"prompt": [' + b"100, " * 100 + b"7]}")) == 1, "token ids, too"
    assert len(keys(b'{"prompt": "' + b"\\ud800" * 300 + b'", "cache_salt": "\\udfff"}')) == 1
