"""Which part of a step the time of a profile belongs to, read from the trace that PyTorch's profiler exports.

The trace's events, in microseconds: ranges that we named ("user_annotation"), PyTorch's operators ("cpu_op"), the
host's launches ("cuda_runtime", "cuda_driver"), and what ran on the GPU ("kernel", "gpu_memcpy", "gpu_memset"), which
carries the number of its launch.
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LINEAR, ATTENTION, ELEMENTWISE, SAMPLING = "linear layers", "attention", "elementwise", "sampling"
HOST, IDLE, STEP = "host", "idle", "step"
RANGES = {LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP}
COMPILED, PYTHON = "numba: ", "Python, outside of operators"
LAUNCHES = {"cuda_runtime", "cuda_driver"}
DRAWING = tuple(f"{step}_kernel" for step in ("chunk", "narrow", "settle", "weigh", "pick"))
"""Kernels that choose tokens, in CUDA graphs only."""
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
        """Steps of each phase, in the order in which phases first came."""

    def of(self, event: Event) -> str:
        return self._phases[max(0, bisect_left(self._times, event["ts"] + event["dur"]) - 1)]


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


def parts_on_cpu(events: Sequence[Event]) -> tuple[Parts, Works]:
    """Parts: an outer range counts for what its inner ones leave, and a step's rest is the host's. Work: PyTorch's
    operators and Numba's functions, each without those that it calls; what is left of the steps is Python."""
    phases, works = Phases(events), dict[tuple[str, str, str], Work]()
    parts: Parts = {p: dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP), 0.0) for p in phases.counts}
    whose: dict[int, Work] = {}
    for event, stack in nested(events, {"user_annotation", "cpu_op"}):
        phase, name, seconds, around = phases.of(event), event["name"], event["dur"] / 1e6, innermost(stack)
        if name in RANGES:
            parts[phase][name] += seconds
            if around is not None:
                parts[phase][around] -= seconds
        elif event["cat"] == "cpu_op" or name.startswith(COMPILED):
            part = HOST if around in (None, STEP) else around
            whose[id(event)] = _add(works, phase, name, part, seconds)
            caller = next((whose[id(e)] for e in reversed(stack) if id(e) in whose), None)
            if caller is not None:
                caller.seconds -= seconds
    for phase, spent in parts.items():
        spent[HOST] = spent.pop(STEP)
        rest = sum(spent.values()) - sum(work.seconds for key, work in works.items() if key[0] == phase)
        works[phase, PYTHON, HOST] = Work(PYTHON, "", phases.counts[phase], rest)
    return parts, _longest_first(works)


def family(kernel: str) -> str:
    """A kernel's name up to its first number: libraries choose other tiles of the same kernel for other shapes."""
    return re.split(r"\d", kernel, maxsplit=1)[0] or kernel


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


def parts_on_gpu(events: Sequence[Event], known: Mapping[str, str]) -> tuple[Parts, Works]:
    """Kernels belong to parts by their names; copies and what was not learnt are the host's. They belong to the step
    that launched them (all kernels of a CUDA graph carry the number of its launch), else to that of the kernel before.

    Parts: while nothing runs is idle, and counts for the step that comes next. A kernel that starts while another runs
    counts from that one's end on: until then it waits. So the parts together are the time that passed. Work: the time
    of each kernel in full.
    """
    phases, works = Phases(events), dict[tuple[str, str, str], Work]()
    launched = {e["args"]["correlation"]: phases.of(e) for e in events if e.get("cat") in LAUNCHES and "dur" in e}
    names = (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE)
    parts: Parts = {phase: dict.fromkeys(names, 0.0) for phase in phases.counts}
    phase, end = next(iter(parts)), None
    for event in sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"] + e["dur"]):
        name, start, stop = event["name"], event["ts"], event["ts"] + event["dur"]
        phase = launched.get(event["args"].get("correlation"), phase)
        part = known.get(name) or known.get(family(name), HOST)
        before = start if end is None else end
        parts[phase][part] += (stop - max(start, before)) / 1e6
        parts[phase][IDLE] += max(0.0, start - before) / 1e6
        _add(works, phase, name, part, event["dur"] / 1e6)
        end = stop
    return parts, _longest_first(works)


def _add(works: dict[tuple[str, str, str], Work], phase: str, name: str, part: str, seconds: float) -> Work:
    work = works.setdefault((phase, name, part), Work(name, part))
    work.calls += 1
    work.seconds += seconds
    return work


def _longest_first(works: Mapping[tuple[str, str, str], Work]) -> Works:
    found: Works = {phase: [] for phase, _, _ in works}
    for (phase, _, _), work in sorted(works.items(), key=lambda item: -item[1].seconds):
        found[phase].append(work)
    return found
