"""`race` in a terminal of 100 x 30, and in a pipe."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from common.arena import race
from common.arena.presets import find
from common.arena.race import Race
from common.arena.side import Side
from common.arena.terminal import Screen
from common.cli import run_app
from stages import __main__ as program
from tests.arena.actors import WORDS, Actor
from tests.arena.watching import TWO
from tests.test_cli import TINY

ROOT = Path(__file__).parent.parent.parent


def drawn(screen: Screen) -> list[str]:
    console = Console(width=100, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(screen)
    return capture.get().splitlines()


def test_the_picture_fits_and_shows_answers_figures_and_memory(sides: list[Side]) -> None:
    screen = Screen(sides, TWO, "turns")
    seen: list[list[str]] = []
    seen_at = [0.0]

    def tell(event: dict[str, Any]) -> None:
        screen.tell(event)
        if event["event"] != "step" or event["t"] - seen_at[-1] > 0.05:
            seen_at.append(event.get("t", 0.0))
            seen.append(drawn(screen))

    Race(sides, TWO, "turns", tell).run()
    for lines in seen:
        assert len(lines) <= 30
        assert max(len(line) for line in lines) <= 100
    during = next(picture for picture in map("\n".join, seen) if "[live]" in picture and "█" in picture)
    last = "\n".join(seen[-1])
    assert "m1 kv cache" in during and "m4 flash attention" in during
    assert "live" in during
    assert "░" in during  # held, but empty
    assert last.count("✓") == 4
    assert "tokens/s" in last or "tok/s" in last

    with Live(screen, console=Console(file=io.StringIO()), auto_refresh=False) as live:
        screen.replay(live)
    screen.over()
    replayed = "\n".join(drawn(screen))
    assert screen.verdict in replayed
    assert replayed.count("✓") == 4


def test_the_memory_says_whose_it_is_without_colours_and_the_foot_what_loads() -> None:
    screen = Screen([Actor("m1"), Actor("m6")], find("many", [1, 6]), "turns")
    pictures: list[str] = []

    def tell(event: dict[str, Any]) -> None:
        screen.tell(event)
        if event["event"] in ("loading", "step"):
            pictures.append("\n".join(drawn(screen)))

    Race([Actor("m1"), Actor("m6")], find("many", [1, 6]), "turns", tell).run()
    assert "██░░░░░░░░░░░░░░░░░░░░░░ m1: making its 4-bit weights, 3 of 30." in pictures[0]
    assert WORDS[:24] in pictures[-1], "the beginning of an answer"
    assert "1█2█3█4█5█6█7█8█9█a█b█c█···" in pictures[-1]


@pytest.fixture
def command(sides: list[Side], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Exit status of `python -m stages race ...`, between sides that are open already and stay so."""
    monkeypatch.setattr(race, "open_sides", lambda folders, arguments: sides)
    monkeypatch.setattr(program, "_closed", nullcontext)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            run_app(program.app, ["race", *arguments, *TINY])
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


def test_own_prompts_come_with_an_option_and_their_absence_is_one_line(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("m1", "m4", "--together", "--prompt", "a first prompt", "--prompt", "a second") == 0
    assert capsys.readouterr().out.startswith("Your own prompts. Output: m1 ")
    assert command("m1", "m4", "--preset", "own") == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "--prompt" in error


def test_into_a_pipe_goes_the_verdict_alone() -> None:
    command = [sys.executable, "-m", "stages", "race", "m1", "m3", "--preset", "many", "--together", *TINY]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.startswith("Many short requests. Output: m1 ")


def test_what_cannot_be_is_one_line(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    too_long = ["m1", "m4", "--preset", "samples"]  # for the tiny model's 512 positions
    both = ["m1", "m4", "--preset", "many", "--prompt", "hello"]
    wrong = (
        (both, "not both"),
        (["m1", "m4", "--preset", "weights"], "make stage6 stage7 race PRESET=weights"),
        (["m1", "m9"], "unknown stage"),
        (["m1", "m4", "--preset", "x"], "unknown preset"),
        (too_long, "m1: the "),
    )
    for arguments, says in wrong:
        assert command(*arguments) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert says in error
