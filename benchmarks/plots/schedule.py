"""Steps as boxes on an axis of time, a row for each request: what was computed, how many tokens, and what waited."""

from collections.abc import Mapping
from itertools import pairwise

from matplotlib import pyplot as plt

from benchmarks.plots.picture import headed
from benchmarks.plots.timeline import KINDS
from benchmarks.style import WIDTH, title
from common.watch.trace import StepTrace


def longest_gap(trace: StepTrace, request_id: str) -> float:
    """Seconds: the longest time between two tokens of a request that decodes."""
    ends = [s.begin + s.duration for s in trace.steps if any(c.request_id == request_id for c in s.chunks)]
    return max(b - a for a, b in pairwise(ends))


def schedule_figure(traces: Mapping[str, StepTrace], finding: str = "", where: str = "") -> plt.Figure:
    """A panel for each stage. The requests are named A, B, ... in order of arrival. Without a finding, it is the
    longest stall. where: model, dtype, machine."""
    figure, axes = plt.subplots(len(traces), 1, figsize=(WIDTH, 0.8 + 2.2 * len(traces)), squeeze=False, sharex=True)
    for axis, (stage, trace) in zip(axes[:, 0], traces.items(), strict=True):
        _panel(axis, stage, trace)
    axes[-1, 0].set_xlabel("milliseconds")
    note = "A box is what a step computes for a request. Dark: tokens of the prompt, and how many. Pale: one token "
    note += f"decoded; it takes as long as its step, so also as long as a chunk in it. {where}"
    return headed(figure, finding or _finding(traces), note)


def _panel(axis: plt.Axes, stage: str, trace: StepTrace) -> None:
    rows = {id: row for row, id in enumerate(trace.arrivals)}
    steps = list(trace.steps)[1:]  # the first one prefills A and B
    start = steps[0].begin
    for step in steps:
        left, width = (step.begin - start) * 1e3, step.duration * 1e3
        for chunk in step.chunks:
            axis.barh(rows[chunk.request_id], width, left=left, height=0.8, color=KINDS[chunk.kind], edgecolor="white")
            if chunk.length > 1:
                middle, ink = left + width / 2, "white" if chunk.kind == "prefill" else "black"
                axis.text(middle, rows[chunk.request_id], str(chunk.length), ha="center", va="center", color=ink)
    axis.set_yticks(range(len(rows)), ["ABCDEFGH"[row] for row in rows.values()])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    gap = longest_gap(trace, next(iter(rows))) * 1e3
    axis.set_title(f"{title(stage)}: A and B wait {gap:.0f} ms at most between two tokens", loc="left")


def _finding(traces: Mapping[str, StepTrace]) -> str:
    gaps = {stage: longest_gap(trace, next(iter(trace.arrivals))) * 1e3 for stage, trace in traces.items()}
    parts = ", ".join(f"{gap:.0f} ms in {stage}" for stage, gap in gaps.items())
    return f"A long prompt arrives: the longest stall of the decoding requests is {parts}"
