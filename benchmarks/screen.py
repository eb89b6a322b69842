"""What a comparison shows while it runs: a bar for all, a bar for the current run, a line for each result."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from benchmarks.process import OnMessage
from benchmarks.record import Record
from benchmarks.table import seconds, speed
from benchmarks.worker import Job


def label(stage: str, workload: str, variant: str | None, plain: bool) -> str:
    return " · ".join(part for part in (stage, workload, variant, "plain" if plain else None) if part)


class Screen(Progress):
    """Bars on standard error if it is a terminal; lines in any case."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = ("{task.description:<44}", BarColumn(), "{task.completed:.0f}/{task.total:.0f}", TimeElapsedColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._all = self.add_task("all runs", total=1)
        self._one = self.add_task("starting", total=1)

    def started(self, number: int, total: int, job: Job) -> OnMessage:
        name = label(job.stage, job.workload, job.variant, job.execution is not None)
        self.update(self._all, total=total, completed=number - 1)
        self.reset(self._one, description=name, total=1)

        def on_message(message: dict[str, Any]) -> None:
            if "line" in message:
                self.console.print(f"{name}: {message['line']}", style="dim", soft_wrap=True, markup=False)
            if "phase" in message:
                self.update(self._one, description=f"{name}: {message['phase']}")
            if "done" in message:
                self.update(self._one, completed=message["done"], total=message["total"])

        return on_message

    def result(self, record: Record) -> None:
        self.advance(self._all)
        name = label(record.stage, record.workload, record.variant, record.plain)
        if record.ok:
            gap = f", {seconds(record.itl_s['p50'])} between tokens" if record.itl_s else ""
            self.console.print(f"{name}: {speed(record)} tokens/s{gap}")
        else:
            self.console.print(f"{name}: failed: {record.error}", style="red", soft_wrap=True, markup=False)
