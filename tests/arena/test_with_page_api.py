"""The page's routes: what they take, what they refuse, and the stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

OWN = {"preset": "own", "prompts": ["a first prompt", "and a second one"]}


def events(url: str) -> Iterator[dict[str, Any]]:
    with httpx2.stream("GET", f"{url}/api/events", timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def until(stream: Iterator[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    for event in stream:
        seen.append(event)
        if event["event"] == name:
            return seen
    raise AssertionError(f"the stream ended before {name}")


def test_everybody_hears_the_same_race_and_who_comes_late_hears_it_all(arena: str) -> None:
    early = events(arena)
    until(early, "now")
    assert httpx2.post(f"{arena}/api/race", json=OWN).status_code == 202
    second = httpx2.post(f"{arena}/api/race", json=OWN)
    assert second.status_code == 409
    assert "stop it first" in second.json()["error"]
    live = until(early, "finished")
    late = until(events(arena), "now")
    assert late[1:-1] == live
    assert live[-1]["verdict"].startswith("Output: m1 ")


def test_stop_ends_a_race(arena: str) -> None:
    stream = events(arena)
    until(stream, "now")
    assert httpx2.post(f"{arena}/api/race", json={"preset": "many"}).status_code == 202
    until(stream, "started")
    assert httpx2.post(f"{arena}/api/stop", json={}).json() == {"stopped": True}
    rest = until(stream, "finished")
    assert rest[-1]["verdict"] == ""
    assert [event["stopped"] for event in rest if event["event"] == "ended"] == [True]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"preset": "nonsense"}, 400),
        ({"preset": "own", "prompts": []}, 400),
        ({"preset": "weights"}, 400),
        ({"preset": "many", "mode": "never"}, 422),
        ({"preset": "many", "unknown": 1}, 422),
    ],
)
def test_what_makes_no_race_is_refused(arena: str, body: dict[str, Any], status: int) -> None:
    assert httpx2.post(f"{arena}/api/race", json=body).status_code == status


def test_other_sites_can_start_and_read_nothing(arena: str) -> None:
    """A form of another page can send text, and a name of its own can point here: neither works."""
    for path in ("race", "stop"):
        plain = httpx2.post(
            f"{arena}/api/{path}", content=json.dumps(OWN), headers={"content-type": "text/plain"}, timeout=10
        )
        assert plain.status_code in (415, 422)
    assert httpx2.get(f"{arena}/api/setup", headers={"host": "evil.example"}).status_code == 400
    page = httpx2.get(arena)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")


def test_the_choice_is_that_of_the_stages(arena: str) -> None:
    setup = httpx2.get(f"{arena}/api/setup").json()
    assert [side["stage"] for side in setup["sides"]] == ["m1", "m3"]
    keys = [preset["key"] for preset in setup["presets"]]
    assert keys[0] == "many"
    assert keys[-1] == "own"
    assert "weights" not in keys
