"""A race: every side gets the same prompts, and every viewer the same events.

*In turns*, each side has the whole machine, one after the other; the recordings are then shown side by side, in real
time. That is the fair way on one machine. *Together*, all run at once, each on its share of the cores.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from common.arena.figures import verdict
from common.arena.player import prepare_command
from common.arena.presets import Preset
from common.arena.side import Event, OnEvent, Side
from common.errors import UserError
from common.execution.threads import usable_cpus


class Race:
    """`mode`: `turns` or `together`. Its own events, next to those of the sides, which get the number of their `side`:

    race      what it is about: `preset`, `mode`
    turn      `sides` that play from now on
    finished  `verdict`: one sentence, empty where a side failed or was stopped
    """

    def __init__(self, sides: Sequence[Side], preset: Preset, mode: str, tell: OnEvent) -> None:
        self._sides, self._preset, self._mode, self._tell = sides, preset, mode, tell
        self._ends: dict[int, dict[str, Any]] = {}
        self._stopped = False

    def run(self) -> None:
        """From loading to the verdict."""
        preset = self._preset
        race = {"preset": preset.key, "title": preset.title, "claim": preset.claim, "watch": preset.watch}
        self._tell({"event": "race", "mode": self._mode, **race})
        try:
            cores = usable_cpus()
            threads = cores if self._mode == "turns" else max(1, cores // len(self._sides))
            command = prepare_command(preset.asks, preset.limits, threads)
            ready = [number for number in range(len(self._sides)) if self._follow(number, command) == "prepared"]
            for turn in ([number] for number in ready) if self._mode == "turns" else [ready]:
                if not self._stopped:
                    self._tell({"event": "turn", "sides": list(turn)})
                    with ThreadPoolExecutor() as pool:
                        list(pool.map(self._follow, turn, repeat({"do": "play"})))
        finally:
            said = ""
            if len(self._ends) == len(self._sides) and not self._stopped:
                ends = [(side.stage, self._ends[number]) for number, side in enumerate(self._sides)]
                said = verdict(preset.watch, ends)
            self._tell({"event": "finished", "verdict": said})

    def stop(self) -> None:
        """No further turn; a side that plays ends after the current step, a side that loads ends at once."""
        self._stopped = True
        for side in self._sides:
            side.stop()

    def _follow(self, number: int, command: Event) -> str:
        """Pass on the events of a command; the name of the last one."""
        if self._stopped:
            return ""
        event: Event = {"event": ""}
        for event in self._sides[number].do(command):
            if self._stopped and event["event"] in ("loading", "prepared", "failed"):
                continue  # it was ended while it loaded
            self._tell({"side": number, **event})
        if event["event"] == "ended" and not event["stopped"]:
            self._ends[number] = event["figures"]
        return event["event"]


def open_sides(folders: Sequence[str], arguments: Sequence[str]) -> list[Side]:
    """Start the processes of two stages or more; the model loads in the first race."""
    if len(folders) < 2:
        raise UserError("a race needs two stages at least: make stage1 stage6 arena")
    if len(set(folders)) < len(folders):
        raise UserError("a stage races once: name different ones")
    return [Side(folder, arguments) for folder in folders]
