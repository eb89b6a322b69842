"""Which part of a step the time of a profile belongs to, read from the trace that PyTorch's profiler exports.

The trace's events, in microseconds: ranges that we named ("user_annotation"), the host's launches ("cuda_runtime",
"cuda_driver"), and what ran on the GPU ("kernel", "gpu_memcpy", "gpu_memset"), which carries the number of its launch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LINEAR, ATTENTION, ELEMENTWISE, SAMPLING = "linear layers", "attention", "norms and rotary", "sampling"
HOST, IDLE, STEP = "host", "idle", "step"
RANGES = {LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}

Event = Mapping[str, Any]


def nested(events: Sequence[Event], categories: set[str]) -> Iterator[tuple[Event, Event | None]]:
    """Events of these categories, each with the innermost named range that it lies in, on its own thread."""
    open_ranges: dict[Any, list[Event]] = defaultdict(list)
    wanted = [e for e in events if e.get("cat") in {"user_annotation", *categories} and "dur" in e]
    for event in sorted(wanted, key=lambda e: (e["ts"], -e["dur"])):
        ranges = open_ranges[event["tid"]]
        while ranges and ranges[-1]["ts"] + ranges[-1]["dur"] <= event["ts"]:
            ranges.pop()
        if event["cat"] in categories:
            yield event, ranges[-1] if ranges else None
        if event["cat"] == "user_annotation" and event["name"] in RANGES:
            ranges.append(event)


def parts_on_cpu(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of each part: an outer range counts for what its inner ones leave, and a step's rest is the host's."""
    spent = dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, STEP), 0.0)
    for event, around in nested(events, {"user_annotation"}):
        if event["name"] in RANGES:
            spent[event["name"]] += event["dur"] / 1e6
            if around is not None:
                spent[around["name"]] -= event["dur"] / 1e6
    spent[HOST] = spent.pop(STEP)
    return spent


def family(kernel: str) -> str:
    """A kernel's name up to its first number: libraries choose other tiles of the same kernel for other shapes."""
    found = re.match(r"\D+", kernel)
    return found[0] if found else kernel


def learn_kernels(events: Sequence[Event]) -> dict[str, str]:
    """Which part each kernel, and each family of kernels, belongs to: where it was launched, weighed by its time."""
    launched = {event["args"]["correlation"]: around for event, around in nested(events, LAUNCHES) if around}
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        around = launched.get(event["args"].get("correlation")) if event.get("cat") in ON_GPU else None
        if around is not None:
            part = HOST if around["name"] == STEP else around["name"]
            for name in {event["name"], family(event["name"])}:
                spent[name][part] += event["dur"]
    return {name: parts.most_common(1)[0][0] for name, parts in spent.items()}


def parts_on_gpu(events: Sequence[Event], known: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each part: kernels by their names; copies and what was not learnt count as the host's; the rest,
    while nothing runs, is idle. A kernel that starts while another runs counts from that one's end on: until then it
    waits. So the parts together are the time that passed."""
    parts = dict.fromkeys((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE), 0.0)
    end: float | None = None
    for event in sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"] + e["dur"]):
        name, start, stop = event["name"], event["ts"], event["ts"] + event["dur"]
        before = start if end is None else end
        parts[known.get(name) or known.get(family(name), HOST)] += (stop - max(start, before)) / 1e6
        parts[IDLE] += max(0.0, start - before) / 1e6
        end = stop
    return parts
