"""The figures of a run as it goes on. The page and the terminal only show them."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 1.0  # seconds over which the live tokens/s is counted


@dataclass(frozen=True)
class Figure:
    """more_wins: a higher value is better."""

    title: str
    unit: str
    more_wins: bool


FIGURES = {
    "speed": Figure("Output", "tokens/s", True),
    "ttft": Figure("First token, median", "s", False),
    "gap": Figure("Longest pause", "s", False),
    "together": Figure("Most at once", "answers", True),
    "memory": Figure("KV memory, peak", "tokens", False),
    "time": Figure("Time", "s", False),
}
PEAK = Figure("Most memory that a step took", "MB", False)  # `peak`, in demonstrations alone


@dataclass
class Figures:
    """Counts what each step brought; all times in seconds since the start of the run. `total`: answers of the run.

    The longest pause is between two tokens of one answer, so it does not count waiting for the first one.
    """

    total: int
    arrivals: dict[int, float] = field(default_factory=dict[int, float])
    _tokens: int = 0
    _done: int = 0
    _ttfts: list[float] = field(default_factory=list[float])
    _last_token: dict[int, float] = field(default_factory=dict[int, float])
    _gap: float = 0.0
    _together: int = 0
    _memory: int = 0
    _window: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])
    _time: float = 0.0

    def step(self, now: float, gained: Sequence[tuple[int, int]], ended: int, running: int, reserved: int) -> None:
        """`gained`: (answer, tokens) pairs of the step that ended `now`; `ended`: answers that ended with it;
        `running` and `reserved` (token slots): while it ran."""
        self._time = now
        self._done += ended
        self._together = max(self._together, running)
        self._memory = max(self._memory, reserved)
        count = sum(tokens for _, tokens in gained)
        self._tokens += count
        self._window.append((now, count))
        for answer, _ in gained:
            if answer in self._last_token:
                self._gap = max(self._gap, now - self._last_token[answer])
            else:
                self._ttfts.append(now - self.arrivals.get(answer, 0.0))
            self._last_token[answer] = now

    def now(self) -> dict[str, Any]:
        """While it runs, `speed` is that of the last second."""
        while self._window and self._window[0][0] < self._time - WINDOW:
            self._window.popleft()
        span = min(WINDOW, self._time)
        return self._all(sum(count for _, count in self._window) / span if span else 0.0)

    def at_the_end(self, time: float) -> dict[str, Any]:
        """`speed` is that of the whole run."""
        self._time = time
        return self._all(self._tokens / time if time else 0.0)

    def _all(self, speed: float) -> dict[str, Any]:
        return {
            "speed": round(speed, 1),
            "ttft": round(statistics.median(self._ttfts), 3) if self._ttfts else None,
            "gap": round(self._gap, 3) if self._gap else None,
            "together": self._together,
            "memory": self._memory,
            "time": round(self._time, 3),
            "tokens": self._tokens,
            "done": self._done,
            "total": self.total,
        }


def shown(key: str, value: float | None) -> str:
    """A figure with its unit, such as `'0.13 s'`."""
    figure = FIGURES.get(key, PEAK)
    if value is None:
        return "–"
    if figure.unit == "s":
        return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"
    return "1 answer" if (key, value) == ("together", 1) else f"{value:,.0f} {figure.unit}"


def verdict(watch: str, ends: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The figure of all sides, from their (stage, final figures); the last one's by the first's, better or worse."""
    said = f"{FIGURES.get(watch, PEAK).title}: " + ", ".join(f"{s} {shown(watch, end[watch])}" for s, end in ends) + "."
    known = [(stage, float(figures[watch])) for stage, figures in ends if figures[watch]]
    if len(known) < 2:
        return said
    if max(value for _, value in known) < 1.05 * min(value for _, value in known):
        return f"{said} Within 5 %: no difference to speak of."
    (first, base), (last, value) = known[0], known[-1]
    return f"{said} {last}: {value / base:{'.1f' if value > base else '.2g'}} times {first}'s."
