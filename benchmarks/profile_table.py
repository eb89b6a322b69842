"""A profile as tables in the terminal, as a picture, and as rows to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.profile_parts import ATTENTION, ELEMENTWISE, HOST, IDLE, LINEAR, SAMPLING, Parts, Work, Works

COLORS = {
    LINEAR: "#332288",
    ATTENTION: "#117733",
    ELEMENTWISE: "#DDAA33",
    SAMPLING: "#CC6677",
    HOST: "#8C8C8C",
    IDLE: "#DDDDDD",
}
LONGEST = 12
"""Kernels or operators of a phase that the terminal shows; the JSON has all."""
ALL = "all"


@dataclass
class Profile:
    """counts: steps by phase. work: kernels of a GPU, or operators of a CPU."""

    heading: str
    counts: Mapping[str, int]
    parts: Parts
    work: Works

    def columns(self) -> dict[str, tuple[int, dict[str, float]]]:
        """The number of steps, and milliseconds a step of each part: of all steps, where they are of several phases,
        and of each phase."""
        steps = sum(self.counts.values())
        whole = {p: sum(spent[p] for spent in self.parts.values()) for p in next(iter(self.parts.values()))}
        seconds = {ALL: (steps, whole)} if len(self.parts) > 1 else {}
        seconds |= {phase: (self.counts[phase], spent) for phase, spent in self.parts.items()}
        return {
            phase: (count, {part: time / count * 1e3 for part, time in spent.items()})
            for phase, (count, spent) in seconds.items()
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"phase": phase, "steps": count, "where": part, "ms_per_step": ms}
            for phase, (count, times) in self.columns().items()
            for part, ms in times.items()
        ]

    def work_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "phase": phase,
                "name": work.name,
                "where": work.part,
                "calls_per_step": work.calls / self.counts[phase],
                "us_per_step": work.seconds / self.counts[phase] * 1e6,
            }
            for phase, works in self.work.items()
            for work in works
        ]

    def tables(self, on_gpu: bool) -> Iterator[Table]:
        yield self._parts_table()
        for phase, works in self.work.items():
            yield self._work_table(phase, works, on_gpu)

    def _parts_table(self) -> Table:
        columns = self.columns()
        table = _table(self.heading, "where")
        for phase, (count, _) in columns.items():
            table.add_column(f"{phase}: {count} step{'s' * (count != 1)}\nms a step", justify="right")
            table.add_column("\nshare", justify="right")
        for part in next(iter(columns.values()))[1]:
            cells = [(times[part], sum(times.values()) or 1.0) for _, times in columns.values()]
            table.add_row(part, *(text for ms, whole in cells for text in (f"{ms:.2f}", f"{ms / whole:.0%}")))
        return table

    def _work_table(self, phase: str, works: Sequence[Work], on_gpu: bool) -> Table:
        count, whole = self.counts[phase], sum(work.seconds for work in works) or 1.0
        kind, calls = ("kernels", "launches a step") if on_gpu else ("operators", "calls a step")
        table = _table(f"\n{kind} of a {phase} step", "name")
        table.columns[0].overflow = "ellipsis"
        for column in (calls, "µs a step", "share"):
            table.add_column(column, justify="right")
        table.add_column("where")
        for work in works[:LONGEST]:
            us = work.seconds / count * 1e6
            cells = f"{work.calls / count:,.1f}", f"{us:,.0f}", f"{work.seconds / whole:.0%}"
            table.add_row(short(work.name), *cells, work.part)
        if rest := works[LONGEST:]:
            calls_left, left = sum(w.calls for w in rest) / count, sum(w.seconds for w in rest)
            cells = f"{calls_left:,.1f}", f"{left / count * 1e6:,.0f}", f"{left / whole:.0%}"
            table.add_row(f"{len(rest)} more", *cells, "")
        return table

    def bars(self) -> Figure:
        """A panel for each column of the table, with a bar for each part."""
        columns = self.columns()
        figure, axes = plt.subplots(len(columns), figsize=(11, 0.8 + 2.9 * len(columns)), squeeze=False)
        for axis, (phase, (count, times)) in zip(axes[:, 0], columns.items(), strict=True):
            whole = sum(times.values()) or 1.0
            for row, (part, ms) in enumerate(times.items()):
                axis.barh(row, ms, color=COLORS[part])
                axis.text(ms, row, f"  {ms:.2f} ms, {ms / whole:.0%}", va="center")
            axis.set_yticks(range(len(times)), list(times))
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_title(f"{phase}: {count} step{'s' * (count != 1)}", loc="left")
        axes[-1, 0].set_xlabel("milliseconds a step")
        figure.suptitle(self.heading, x=0.01, ha="left")
        figure.tight_layout()
        return figure


def short(name: str) -> str:
    """A kernel's name without what all of PyTorch's have in common."""
    for common in ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::", "at_cuda_detail::"):
        name = name.replace(common, "")
    return name


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None)
    table.add_column(first, no_wrap=True)
    return table
