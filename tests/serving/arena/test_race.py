"""Races of real processes, on a tiny model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from common.errors import UserError
from common.serving.arena.race import Race, open_sides, usable_cores
from common.serving.arena.side import Side
from tests.serving.arena.watching import TWO, Viewer
from tests.test_cli import TINY


@pytest.fixture(scope="module")
def sides() -> Iterator[list[Side]]:
    opened = open_sides(["m1_kv_cache", "m4_flash_attention"], TINY)  # m4: kernels that bring threads of their own
    yield opened
    for side in opened:
        side.close()


def raced(sides: list[Side], mode: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    Race(sides, TWO, mode, told.append).run()
    return told


def test_in_turns_one_plays_after_the_other(sides: list[Side]) -> None:
    told = raced(sides, "turns")
    names = [(event["event"], event.get("side", event.get("sides"))) for event in told]
    big = [name for name in names if name[0] not in ("loading", "step", "arrived")]
    assert big == [
        ("race", None), ("prepared", 0), ("prepared", 1),
        ("turn", [0]), ("started", 0), ("ended", 0),
        ("turn", [1]), ("started", 1), ("ended", 1), ("finished", None),
    ]  # fmt: skip
    assert [event["threads"] for event in told if event["event"] == "prepared"] == [usable_cores()] * 2
    viewers = [Viewer(), Viewer()]
    for event in told:
        if "side" in event:
            viewers[event["side"]](event)
    assert viewers[0].texts == viewers[1].texts
    assert viewers[0].tokens == [12, 5]
    assert told[-1]["verdict"].startswith("Output: m1 ")


def test_together_all_play_at_once_with_their_share_of_the_cores(sides: list[Side]) -> None:
    told = raced(sides, "together")
    assert [event["sides"] for event in told if event["event"] == "turn"] == [[0, 1]]
    shares = [event["threads"] for event in told if event["event"] == "prepared"]
    assert shares == [max(1, usable_cores() // 2)] * 2
    assert sum(event["event"] == "ended" for event in told) == 2


def test_a_stopped_race_has_no_verdict_and_the_next_one_runs(sides: list[Side]) -> None:
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "started":
            race.stop()

    race = Race(sides, TWO, "turns", tell)
    race.run()
    assert [event["event"] for event in told if event["event"] in ("ended", "finished")] == ["ended", "finished"]
    assert told[-1]["verdict"] == ""
    assert raced(sides, "turns")[-1]["verdict"]


def test_only_the_cores_that_it_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert usable_cores() == 1


def test_whoever_loads_is_stopped_at_once_and_loads_again_in_the_next_race(sides: list[Side]) -> None:
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "loading":
            race.stop()

    process = sides[0]._process
    race = Race(sides, TWO, "turns", tell)
    race.run()
    assert [event["event"] for event in told] == ["race", "loading", "finished"]
    assert process.wait(5) != 0, "an engine that loads listens to nobody: its process is ended"
    assert raced(sides, "turns")[-1]["verdict"]


def test_a_stage_that_dies_is_told_the_other_plays_and_the_next_race_has_both() -> None:
    opened = open_sides(["m1_kv_cache", "m3_paged_kv"], TINY)
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "started" and event["side"] == 0:
            os.kill(opened[0]._process.pid, signal.SIGKILL)

    try:
        Race(opened, TWO, "turns", tell).run()
        failed = [event for event in told if event["event"] == "failed"]
        assert [event["side"] for event in failed] == [0]
        assert "its process has ended" in failed[0]["message"]
        assert [event["side"] for event in told if event["event"] == "ended"] == [1]
        assert told[-1] == {"event": "finished", "verdict": ""}
        assert raced(opened, "turns")[-1]["verdict"]
    finally:
        for side in opened:
            side.close()
    assert all(side._process.returncode is not None for side in opened)


def test_a_model_that_does_not_exist_is_one_line() -> None:
    opened = open_sides(["m1_kv_cache", "m3_paged_kv"], ["--model", "random:nothing", "--device", "cpu"])
    try:
        failed = [event["message"] for event in raced(opened, "turns") if event["event"] == "failed"]
    finally:
        for side in opened:
            side.close()
    assert len(failed) == 2
    assert all("nothing" in message and "\n" not in message for message in failed)


@pytest.mark.parametrize(("folders", "says"), [(["m1_kv_cache"], "two stages"), (["m1_kv_cache"] * 2, "once")])
def test_a_race_needs_two_different_stages(folders: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_sides(folders, TINY)
