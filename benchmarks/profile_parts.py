"""Which part of a step the time of a profile belongs to, read from the trace that PyTorch's profiler exports; and the
profile as tables in the terminal, as a picture, and as rows to keep.

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

from matplotlib import pyplot as plt
from rich.table import Table

LINEAR, ATTENTION, ELEMENTWISE, SAMPLING = "linear layers", "attention", "elementwise", "sampling"
HOST, IDLE, STEP = "host", "idle", "step"
COMMUNICATION = "communication"  # with other ranks, waiting for them included
RANGES = {LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, COMMUNICATION, STEP}
COMPILED, PYTHON = "numba: ", "Python, outside of operators"
LAUNCHES = {"cuda_runtime", "cuda_driver"}
DRAWING = tuple(f"{step}_kernel" for step in ("chunk", "narrow", "settle", "weigh", "pick"))
"""Kernels that choose tokens, in CUDA graphs only."""
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
STEP_NAME = re.compile(r"step \d+ (\w+) \d+")
INKS = ("#332288", "#117733", "#DDAA33", "#CC6677", "#AA4499", "#8C8C8C", "#DDDDDD")
PARTS = (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, COMMUNICATION, HOST, IDLE)
COLORS: Mapping[str, str] = dict(zip(PARTS, INKS, strict=True))
LONGEST = 12  # kernels or operators of a phase that the terminal shows; the JSON has all
COMMON = r"void |at::native::|\(anonymous namespace\)::|<unnamed>::|c10::|at::|gpu_kernel_impl_nocast<|<\d+, (\d+, )?"
"""What the names of PyTorch's kernels have in common."""
WIDEST = 52  # characters of a name

Event = Mapping[str, Any]
Parts = dict[str, dict[str, float]]  # by phase: the seconds of each part, of all steps of that phase


@dataclass
class Work:
    """A kernel of a GPU or an operator of a CPU, of all steps of a phase. part: what it belongs to."""

    name: str
    part: str
    calls: int = 0
    seconds: float = 0.0


Works = dict[str, list[Work]]  # by phase: the longest first
Tally = dict[str, dict[tuple[str, str], Work]]  # by phase, then by name and part


class Phases:
    """Whose step an event of the host belongs to: the last one that had been started when the event ended. So what
    comes before a launch in the same `engine.step()` belongs to it, too."""

    def __init__(self, events: Sequence[Event]) -> None:
        ranges = (e for e in events if e.get("cat") == "user_annotation")
        started = sorted((e["ts"], found[1]) for e in ranges if (found := STEP_NAME.fullmatch(e["name"])))
        self._times, self._phases = [time for time, _ in started], [phase for _, phase in started]
        self.counts = Counter(self._phases)  # steps of each phase, in the order in which phases first came

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
    phases = Phases(events)
    parts: Parts = {p: dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP), 0.0) for p in phases.counts}
    works: Tally = {phase: {} for phase in phases.counts}
    whose: dict[int, Work] = {}
    for event, stack in nested(events, {"user_annotation", "cpu_op"}):
        phase, name, seconds, around = phases.of(event), event["name"], event["dur"] / 1e6, innermost(stack)
        if name in RANGES:
            parts[phase][name] = parts[phase].get(name, 0.0) + seconds
            if around is not None:
                parts[phase][around] -= seconds
        elif event["cat"] == "cpu_op" or name.startswith(COMPILED):
            part = HOST if around in (None, STEP) else around
            whose[id(event)] = _add(works[phase], name, part, seconds)
            caller = next((whose[id(e)] for e in reversed(stack) if id(e) in whose), None)
            if caller is not None:
                caller.seconds -= seconds
    for phase, spent in parts.items():
        spent[HOST] = spent.pop(STEP)
        rest = sum(spent.values()) - sum(work.seconds for work in works[phase].values())
        works[phase][PYTHON, HOST] = Work(PYTHON, "", phases.counts[phase], rest)
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
    phases = Phases(events)
    launched = {e["args"]["correlation"]: phases.of(e) for e in events if e.get("cat") in LAUNCHES and "dur" in e}
    names = (LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE)
    parts: Parts = {phase: dict.fromkeys(names, 0.0) for phase in phases.counts}
    works: Tally = {phase: {} for phase in phases.counts}
    phase, end = next(iter(parts)), None
    for event in sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"] + e["dur"]):
        name, start, stop = event["name"], event["ts"], event["ts"] + event["dur"]
        phase = launched.get(event["args"].get("correlation"), phase)
        part = known.get(name) or known.get(family(name), HOST)
        before = start if end is None else end
        parts[phase][part] = parts[phase].get(part, 0.0) + (stop - max(start, before)) / 1e6
        parts[phase][IDLE] += max(0.0, start - before) / 1e6
        _add(works[phase], name, part, event["dur"] / 1e6)
        end = stop
    return parts, _longest_first(works)


def _add(works: dict[tuple[str, str], Work], name: str, part: str, seconds: float) -> Work:
    work = works.setdefault((name, part), Work(name, part))
    work.calls += 1
    work.seconds += seconds
    return work


def _longest_first(works: Tally) -> Works:
    return {phase: sorted(found.values(), key=lambda work: -work.seconds) for phase, found in works.items()}


@dataclass
class Profile:
    """counts: steps by phase. work: kernels of a GPU, or operators of a CPU."""

    heading: str
    counts: Mapping[str, int]
    parts: Parts
    work: Works

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"phase": phase, "steps": self.counts[phase], "where": part, "ms_per_step": s / self.counts[phase] * 1e3}
            for phase, spent in self.parts.items()
            for part, s in spent.items()
        ]

    def work_rows(self, phase: str) -> list[dict[str, Any]]:
        """The longest first."""
        count, whole = self.counts[phase], sum(work.seconds for work in self.work[phase]) or 1.0
        return [
            {"phase": phase, "name": work.name, "where": work.part, "calls_per_step": work.calls / count,
             "us_per_step": work.seconds / count * 1e6, "share": work.seconds / whole}
            for work in self.work[phase]
        ]  # fmt: skip

    def labels(self) -> dict[str, str]:
        """Of each phase: its number of steps, and their share of the time."""
        times = {phase: sum(spent.values()) for phase, spent in self.parts.items()}
        shares = {phase: time / (sum(times.values()) or 1.0) for phase, time in times.items()}
        named = {phase: f"{n} {phase} step{'s' * (n != 1)}" for phase, n in self.counts.items()}
        return {phase: f"{steps}, {shares[phase]:.0%} of the time" for phase, steps in named.items()}

    def tables(self) -> Iterator[Table]:
        for phase, label in self.labels().items():
            table = Table(title=f"\n{label}", title_justify="left", title_style="", box=None)
            for column in ("where", "", "ms a step", "share", " "):
                table.add_column(column, justify="left" if column in ("where", " ") else "right", no_wrap=True)
            whole = sum(self.parts[phase].values()) or 1.0
            for part, s in self.parts[phase].items():
                table.add_row(part, "", f"{s / self.counts[phase] * 1e3:.2f}", f"{s / whole:.0%}", "")
            table.add_row()
            table.add_row("kernel or operator", "calls a step", "µs a step", "share", "where", style="bold")
            rows = self.work_rows(phase)
            more = {key: sum(row[key] for row in rows[LONGEST:]) for key in ("calls_per_step", "us_per_step", "share")}
            left = [{"name": f"{len(rows) - LONGEST} more", "where": "", **more}] if rows[LONGEST:] else []
            for row in rows[:LONGEST] + left:
                cells = f"{row['calls_per_step']:,.1f}", f"{row['us_per_step']:,.0f}", f"{row['share']:.0%}"
                name = re.sub(COMMON, " ", row["name"]).strip()
                table.add_row(name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…", *cells, row["where"])
            yield table

    def bars(self) -> plt.Figure:
        """A panel for each phase, with a bar for each part."""
        figure, axes = plt.subplots(len(self.parts), figsize=(11, 0.8 + 2.9 * len(self.parts)), squeeze=False)
        for axis, (phase, label) in zip(axes[:, 0], self.labels().items(), strict=True):
            times, whole = self.parts[phase], sum(self.parts[phase].values()) or 1.0
            for row, (part, s) in enumerate(times.items()):
                ms = s / self.counts[phase] * 1e3
                axis.barh(row, ms, color=COLORS[part])
                axis.text(ms, row, f"  {ms:.2f} ms, {s / whole:.0%}", va="center")
            axis.set_yticks(range(len(times)), list(times))
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_title(label, loc="left")
        axes[-1, 0].set_xlabel("milliseconds a step")
        figure.suptitle(self.heading, x=0.01, ha="left")
        figure.tight_layout()
        return figure
