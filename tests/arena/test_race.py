"""Races of real processes, on a tiny model."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from typing import Any

import pytest

from common.arena.race import Race, open_sides
from common.arena.side import Side
from common.errors import UserError
from common.execution.threads import usable_cpus
from tests.arena.watching import TWO, Viewer
from tests.test_cli import TINY


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
    assert [event["threads"] for event in told if event["event"] == "prepared"] == [usable_cpus()] * 2
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
    assert shares == [max(1, usable_cpus() // 2)] * 2
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


def test_a_side_that_loads_is_stopped_at_once_and_loads_again_in_the_next_race(sides: list[Side]) -> None:
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "loading":
            race.stop()

    process = sides[0]._process
    race = Race(sides, TWO, "turns", tell)
    race.run()
    assert [event["event"] for event in told] == ["race", "loading", "finished"]
    assert process.wait(5) != 0, "an engine that loads does not listen: its process is ended"
    assert raced(sides, "turns")[-1]["verdict"]


def test_a_stage_that_dies_is_told_the_other_plays_and_the_next_race_has_both(sides: list[Side]) -> None:
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "started" and event["side"] == 0:
            os.kill(sides[0]._process.pid, signal.SIGKILL)

    Race(sides, TWO, "turns", tell).run()
    failed = [event for event in told if event["event"] == "failed"]
    assert [event["side"] for event in failed] == [0]
    assert "its process has ended" in failed[0]["message"]
    assert [event["side"] for event in told if event["event"] == "ended"] == [1]
    assert told[-1] == {"event": "finished", "verdict": ""}
    assert raced(sides, "turns")[-1]["verdict"]


def test_a_model_that_does_not_exist_is_one_line() -> None:
    with closing(Side("m3_paged_kv", ["--model", "random:nothing", "--device", "cpu"])) as side:
        [failed] = [event["message"] for event in raced([side], "turns") if event["event"] == "failed"]
    assert "nothing" in failed and "\n" not in failed


@pytest.mark.parametrize(("folders", "says"), [(["m1_kv_cache"], "two stages"), (["m1_kv_cache"] * 2, "once")])
def test_a_race_needs_two_different_stages(folders: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_sides(folders, TINY)
