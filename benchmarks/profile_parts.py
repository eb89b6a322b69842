"""Which part of a step the time of a profile belongs to, read from the trace that PyTorch's profiler exports.

The trace's events, in microseconds: ranges that we named ("user_annotation"), PyTorch's operators ("cpu_op"), the
host's launches ("cuda_runtime", "cuda_driver"), and what ran on the GPU ("kernel", "gpu_memcpy", "gpu_memset"), which
carries the number of its launch.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LINEAR, ATTENTION, ELEMENTWISE, SAMPLING = "linear layers", "attention", "norms and rotary", "sampling"
HOST, IDLE, STEP = "host", "idle", "step"
RANGES = {LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP}
COMPILED = "numba: "
"""The ranges of Numba's functions begin so."""
LAUNCHES = {"cuda_runtime", "cuda_driver"}
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
STEP_NAME = re.compile(r"step \d+ (\w+) \d+")

Event = Mapping[str, Any]
Parts = dict[str, dict[str, float]]
"""By phase: the seconds of each part, of all steps of that phase."""


@dataclass
class Work:
    """A kernel of a GPU or an operator of a CPU, of all steps of a phase. part: what it belongs to."""

    name: str
    part: str
    calls: int = 0
    seconds: float = 0.0


Works = dict[str, list[Work]]
"""By phase: the longest first."""


class Phases:
    """Whose step an event of the host belongs to: the last one that had been started when the event ended. So what
    comes before a launch in the same `engine.step()` belongs to it, too."""

    def __init__(self, events: Sequence[Event]) -> None:
        ranges = (e for e in events if e.get("cat") == "user_annotation")
        started = sorted((e["ts"], found[1]) for e in ranges if (found := STEP_NAME.fullmatch(e["name"])))
        self._times, self._phases = [time for time, _ in started], [phase for _, phase in started]
        self.counts = Counter(self._phases)

    def of(self, event: Event) -> str:
        return self._phases[max(0, bisect_left(self._times, event["ts"] + event["dur"]) - 1)]

    @property
    def first(self) -> str:
        return self._phases[0]


def nested(events: Sequence[Event], categories: set[str]) -> Iterator[tuple[Event, list[Event]]]:
    """Events of these categories, each with the ranges and events that it lies in on its own thread, outermost first
    (valid until the next one is taken)."""
    stacks: dict[Any, list[Event]] = defaultdict(list)
    wanted = [e for e in events if e.get("cat") in {"user_annotation", *categories} and "dur" in e]
    for event in sorted(wanted, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks[event["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if event["cat"] in categories:
            yield event, stack
        stack.append(event)


def innermost(stack: Sequence[Event]) -> str | None:
    """The part of which the stack's events are."""
    return next((event["name"] for event in reversed(stack) if event["name"] in RANGES), None)


def parts_on_cpu(events: Sequence[Event]) -> Parts:
    """An outer range counts for what its inner ones leave, and a step's rest is the host's."""
    phases = Phases(events)
    parts: Parts = {p: dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP), 0.0) for p in phases.counts}
    for event, stack in nested(events, {"user_annotation"}):
        if event["name"] in RANGES:
            spent = parts[phases.of(event)]
            spent[event["name"]] += event["dur"] / 1e6
            if (around := innermost(stack)) is not None:
                spent[around] -= event["dur"] / 1e6
    for spent in parts.values():
        spent[HOST] = spent.pop(STEP)
    return parts


def work_on_cpu(events: Sequence[Event]) -> Works:
    """PyTorch's operators, and functions that Numba compiled, each without what it calls of them; and Python's rest."""
    phases, found = Phases(events), dict[tuple[str, str, str], Work]()
    whose: dict[int, Work] = {}
    for event, stack in nested(events, {"cpu_op", "user_annotation"}):
        if event["cat"] == "user_annotation" and not event["name"].startswith(COMPILED):
            continue
        part = innermost(stack) or STEP
        key = phases.of(event), event["name"], HOST if part == STEP else part
        work = whose[id(event)] = found.setdefault(key, Work(*key[1:]))
        work.calls += 1
        work.seconds += event["dur"] / 1e6
        caller = next((whose[id(e)] for e in reversed(stack) if id(e) in whose), None)
        if caller is not None:
            caller.seconds -= event["dur"] / 1e6
    works = _by_phase(phases, found)
    for phase, parts in parts_on_cpu(events).items():
        rest = sum(parts.values()) - sum(work.seconds for work in works[phase])
        works[phase].append(Work("Python, outside of operators", "", phases.counts[phase], rest))
        works[phase].sort(key=lambda work: -work.seconds)
    return works


def family(kernel: str) -> str:
    """A kernel's name up to its first number: libraries choose other tiles of the same kernel for other shapes."""
    found = re.match(r"\D+", kernel)
    return found[0] if found else kernel


def learn_kernels(events: Sequence[Event]) -> dict[str, str]:
    """Which part each kernel, and each family of kernels, belongs to: where it was launched, weighed by its time."""
    launched = {event["args"]["correlation"]: innermost(stack) for event, stack in nested(events, LAUNCHES)}
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        around = launched.get(event["args"].get("correlation")) if event.get("cat") in ON_GPU else None
        if around is not None:
            for name in {event["name"], family(event["name"])}:
                spent[name][HOST if around == STEP else around] += event["dur"]
    return {name: parts.most_common(1)[0][0] for name, parts in spent.items()}


def parts_on_gpu(events: Sequence[Event], known: Mapping[str, str]) -> Parts:
    """Kernels by their names; copies and what was not learnt count as the host's; the rest, while nothing runs, is
    idle, and counts for the step that comes next. A kernel that starts while another runs counts from that one's end
    on: until then it waits. So the parts together are the time that passed."""
    names = (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE)
    parts: Parts = {phase: dict.fromkeys(names, 0.0) for phase in Phases(events).counts}
    end: float | None = None
    for event, phase, part in _gpu_events(events, known):
        start, stop = event["ts"], event["ts"] + event["dur"]
        before = start if end is None else end
        parts[phase][part] += (stop - max(start, before)) / 1e6
        parts[phase][IDLE] += max(0.0, start - before) / 1e6
        end = stop
    return parts


def work_on_gpu(events: Sequence[Event], known: Mapping[str, str]) -> Works:
    """Kernels and copies, each with its own time: where two ran at once, both count in full."""
    found = dict[tuple[str, str, str], Work]()
    for event, phase, part in _gpu_events(events, known):
        work = found.setdefault((phase, event["name"], part), Work(event["name"], part))
        work.calls += 1
        work.seconds += event["dur"] / 1e6
    return _by_phase(Phases(events), found)


def _gpu_events(events: Sequence[Event], known: Mapping[str, str]) -> Iterator[tuple[Event, str, str]]:
    """What ran on the GPU, in the order in which it ended, with its step's phase and its part. The kernels of a CUDA
    graph carry the number of the graph's launch; one without a launch is of the step of the kernel before it."""
    phases = Phases(events)
    launched = {e["args"]["correlation"]: phases.of(e) for e in events if e.get("cat") in LAUNCHES and "dur" in e}
    phase = phases.first
    for event in sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"] + e["dur"]):
        phase = launched.get(event["args"].get("correlation"), phase)
        yield event, phase, known.get(event["name"]) or known.get(family(event["name"]), HOST)


def _by_phase(phases: Phases, found: Mapping[tuple[str, str, str], Work]) -> Works:
    works: Works = {phase: [] for phase in phases.counts}
    for (phase, _, _), work in sorted(found.items(), key=lambda item: -item[1].seconds):
        works[phase].append(work)
    return works
