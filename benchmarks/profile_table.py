"""A profile as tables in the terminal, as a picture, and as rows to keep."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.profile_parts import ATTENTION, ELEMENTWISE, HOST, IDLE, LINEAR, SAMPLING, Parts, Works

INKS = ("#332288", "#117733", "#DDAA33", "#CC6677", "#8C8C8C", "#DDDDDD")
COLORS: Mapping[str, str] = dict(zip((LINEAR, ATTENTION, ELEMENTWISE, SAMPLING, HOST, IDLE), INKS, strict=True))
LONGEST = 12
"""Kernels or operators of a phase that the terminal shows; the JSON has all."""
COMMON = r"void |at::native::|\(anonymous namespace\)::|<unnamed>::|c10::|at::|gpu_kernel_impl_nocast<|<\d+, (\d+, )?"
"""What the names of PyTorch's kernels have in common."""
WIDEST = 52
"""Characters of a name."""


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
            {
                "phase": phase,
                "name": work.name,
                "where": work.part,
                "calls_per_step": work.calls / count,
                "us_per_step": work.seconds / count * 1e6,
                "share": work.seconds / whole,
            }
            for work in self.work[phase]
        ]

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

    def bars(self) -> Figure:
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
