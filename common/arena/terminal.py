"""The arena in a terminal, legible at 100 columns and 30 lines: the live runs, then the recordings side by side."""

import textwrap
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.arena.figures import FIGURES, shown
from common.arena.presets import Preset
from common.arena.race import Race
from common.arena.side import Event, Side
from common.errors import UserError

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow", "bright_green",
           "bright_magenta", "bright_blue", "bright_red")  # fmt: skip
STEPS = {"prefill": ("P", "yellow"), "fork": ("P", "yellow"), "decode": ("d", "blue"), "recompute": ("R", "magenta"),
         "idle": ("-", "bright_black")}  # fmt: skip
MARKS = "123456789abcdefg"  # one character for each answer, also in the memory: colours alone would not tell them apart
MEMORY_LINES = 3
BAR = 24  # characters, while a stage loads
PAUSE = 0.15  # seconds between two pictures: drawing takes CPU time from the engine


class LaneView:
    """The state of one side after its events so far."""

    def __init__(self, title: str, watch: str) -> None:
        self.title, self._watch = title, watch
        self.badge = ""
        self.reset()

    def reset(self) -> None:
        self._prepared: Event | None = None
        self._figures: dict[str, Any] = {}
        self._regions: dict[int, tuple[int, int, list[int]]] = {}
        self._texts: list[str] = []
        self._states: list[str] = []
        self._kinds: list[tuple[str, str]] = []  # of the last steps

    def apply(self, event: Event) -> None:
        name = event["event"]
        if name == "prepared":
            self._prepared = event
            self._texts = [""] * len(event["answers"])
            self._states = [" "] * len(event["answers"])
        elif name == "arrived":
            for answer in event["answers"]:
                self._states[answer] = "…"
        elif name == "step":
            self._step(event)
        elif name == "failed":
            self.badge = event["message"]
        for start in event.get("kv", {}).get("free", ()):
            self._regions.pop(start, None)
        for start, length, stored, owners in event.get("kv", {}).get("set", ()):
            self._regions[start] = (length, stored, owners)
        self._figures = event.get("figures", self._figures)

    def _step(self, event: Event) -> None:
        for answer, kind, _ in event["chunks"]:
            if self._states[answer] != "✓":
                self._states[answer] = STEPS[kind][0]
        for answer in event["preempted"]:
            self._states[answer] = "↩"
        for answer, text, _, reason in event["gained"]:
            self._texts[answer] += text
            self._states[answer] = "✓" if reason else "d"
        kinds = {kind for _, kind, _ in event["chunks"]}
        mixed = "decode" in kinds and kinds & {"prefill", "recompute"}
        self._kinds.append(("M", "green") if mixed else STEPS[next((k for k in STEPS if k in kinds), "idle")])

    def picture(self, width: int, lines: int) -> Panel:
        """A panel of `width` columns, borders included."""
        inner = width - 4
        answers = self._answers(inner, max(1, lines - 2 - 3 - MEMORY_LINES - 1 - 1))
        parts = Group(self._figures_table(), self._memory(inner), self._steps(inner), answers)
        style = "bold green" if self.badge in ("live", "replay") else "white"
        title = Text(f" {self.title} ", "bold") + Text(f"[{self.badge or 'ready'}] ", style)
        return Panel(parts, title=title, title_align="left", padding=(0, 1), border_style=style)

    def _figures_table(self) -> Table:
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in range(4):
            table.add_column(no_wrap=True)
        cells: list[Text] = []
        for key, name in zip(FIGURES, ("output", "1st token", "pause", "at once", "KV peak", "time"), strict=True):
            style = "bold reverse" if key == self._watch else "bold"
            value = shown(key, self._figures.get(key)).replace("answers", "").replace("tokens", "tok")
            cells += [Text(name, "dim"), Text(value.strip(), style)]
        for row in range(0, len(cells), 4):
            table.add_row(*cells[row : row + 4])
        return table

    def _memory(self, width: int) -> Text:
        """The token slots in order, 1, 2, 4, ... to a character, so that all fit."""
        prepared = self._prepared
        if prepared is None or not prepared["capacity"]:
            text = "no KV cache: everything is recomputed" if prepared else ""
            return Text(text + "\n" * (MEMORY_LINES - 1), "dim")
        unit = 1
        while prepared["capacity"] > unit * width * MEMORY_LINES:
            unit *= 2
        map_ = [("·", "bright_black", "")] * -(-prepared["capacity"] // unit)
        for start, (length, stored, owners) in self._regions.items():
            for slot in range(start, start + length, unit):
                kept = not owners or owners[0] < 0
                filled = slot - start < stored
                glyph = "▒" if kept else ("▦" if len(owners) > 1 else "█") if filled else "░"
                style = "white" if kept else COLOURS[owners[0] % len(COLOURS)]
                map_[slot // unit] = (glyph, style, MARKS[owners[0]] if len(owners) == 1 and not kept else "")
        text, last = Text(), ""
        for index, (glyph, style, mark) in enumerate(map_):
            begins = mark and (mark != last or index % width == 0)  # the first of neighbours says whose
            last = mark
            text.append(mark if begins else glyph, f"{style} reverse" if begins and glyph == "█" else style)
            text.append("\n" if (index + 1) % width == 0 else "")
        return text.append("\n" * (MEMORY_LINES - 1 - text.plain.count("\n")))

    def _steps(self, width: int) -> Text:
        text = Text("steps ", "dim")
        for letter, colour in self._kinds[-(width - 6) :]:
            text.append(letter, colour)
        return text

    def _answers(self, width: int, lines: int) -> Text:
        """The beginning of each answer, in as many lines as there are; the first ones where there are too many."""
        text, each = Text(no_wrap=True, overflow="crop"), max(1, lines // max(1, len(self._texts)))
        for index, (state, said) in enumerate(list(zip(self._states, self._texts, strict=True))[:lines]):
            text.append(f"{MARKS[index]} ", COLOURS[index % len(COLOURS)])
            text.append(f"{state} ", "bold")
            begins = textwrap.wrap(" ".join(said.split()), width - 5, max_lines=each, placeholder="…")
            text.append("\n    ".join(begins) + "\n")
        return text


class Screen:
    """All lanes, with the preset's claim above and the status below."""

    def __init__(self, sides: Sequence[Side], preset: Preset, mode: str) -> None:
        self._preset, self._mode = preset, mode
        self.lanes = [LaneView(side.title, preset.watch) for side in sides]
        self.recordings: list[list[Event]] = [[] for _ in sides]
        self.status = "Loading and warming up."
        self.verdict = ""
        self.failures: list[str] = []

    def tell(self, event: Event) -> None:
        """An event of the race, as it comes."""
        name = event["event"]
        if name == "loading":
            total, side = event.get("total", 0), self.lanes[event["side"]].title.split()[0]
            far = round(BAR * event["done"] / total) if total else 0
            bar = "█" * far + "░" * (BAR - far) + " " if total else ""
            count = f", {event['done']} of {total}" if total else ""
            self.status = f"{bar}{side}: {event['text']}{count}."
        elif "side" in event:
            lane = self.lanes[event["side"]]
            self.recordings[event["side"]].append(event)
            lane.apply(event)
            if name == "failed":
                self.failures.append(f"{lane.title.split()[0]}: {event['message']}")
            if name == "ended":
                lane.badge = "stopped" if event["stopped"] else "done"
        elif name == "turn":
            for number, lane in enumerate(self.lanes):
                lane.badge = "live" if number in event["sides"] else lane.badge or "its turn comes"
            self.status = "Live, one after the other: each has the whole machine."
            if self._mode == "together":
                self.status = "Live, at the same time: each has its share of the cores, and is slower than alone."
        elif name == "finished":
            self.verdict = event["verdict"]

    def __rich_console__(self, console: Console, options: Any) -> Any:
        layout = Layout()
        height = min(console.height, 40) - 1
        layout.split_column(Layout(name="head", size=3), Layout(name="lanes"), Layout(name="foot", size=2))
        layout["head"].update(Group(Text(self._preset.title, "bold"), Text(self._preset.claim, "dim")))
        layout["foot"].update(Text(self.status, "bold"))
        width = console.width // len(self.lanes)
        layout["lanes"].split_row(*(Layout(lane.picture(width, height - 5)) for lane in self.lanes))
        yield from console.render(layout, options.update(height=height))

    def replay(self, live: Live) -> None:
        """The recordings, each event at its time."""
        self.status = "The recordings, side by side, in real time."
        for lane in self.lanes:
            lane.reset()
            lane.badge = "replay"
        left = [list(reversed(events)) for events in self.recordings]
        start = time.perf_counter()
        while any(left):
            now = time.perf_counter() - start
            for lane, events in zip(self.lanes, left, strict=True):
                while events and events[-1].get("t", 0.0) <= now:
                    lane.apply(events.pop())
                if not events:
                    lane.badge = "done"
            live.refresh()
            time.sleep(PAUSE / 2)

    def over(self) -> None:
        self.status = self.verdict or self.status


def show(sides: Sequence[Side], preset: Preset, mode: str) -> None:
    """A race, from loading to verdict; Ctrl-C stops it. A pipe gets the verdict. `UserError` if a side failed."""
    console = Console()
    screen = Screen(sides, preset, mode)
    race = Race(sides, preset, mode, screen.tell)
    runner = threading.Thread(target=race.run, daemon=True)
    with Live(screen, console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        runner.start()
        try:
            while runner.is_alive():
                runner.join(PAUSE)
                if console.is_terminal:
                    live.refresh()
            if console.is_terminal and mode == "turns" and screen.verdict:
                screen.replay(live)
        except KeyboardInterrupt:
            race.stop()
            raise
        screen.over()
        if console.is_terminal:
            live.refresh()
    if screen.failures:
        raise UserError("; ".join(screen.failures))
    if not console.is_terminal:
        console.print(f"{preset.title}. {screen.verdict}", soft_wrap=True)
