"""What the notebooks share: measuring a stage, showing its source, and writing figures into text."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.contestant import Setting
from benchmarks.measure import ActivationPeak
from benchmarks.recipes import uniform
from benchmarks.record import Record, record_runs
from benchmarks.stage_contestant import StageContestant
from benchmarks.style import RC
from benchmarks.worker import WARMUP_TOKENS, timed_runs, warm_up
from benchmarks.workloads import Size
from common.cli.options import fastest_dtype
from common.config import DEFAULT_MODEL, stage_options
from stages import number, short_name

ROOT = Path(__file__).resolve().parent.parent
HERE: dict[str, Any] = {"model": DEFAULT_MODEL, "dtype": fastest_dtype("cpu"), "device": "cpu"}
"""The options of every engine that a notebook builds: `stages.build("m1", **HERE)`."""

plt.rcParams.update(RC)


def measure(stage: str, size: Size, repeats: int = 1, **options: Any) -> Record:
    """Run a workload on a stage as `make bench` does, but in this process: build, warm up, run, write down.

    options: further engine options; one that the stage does not have yet is left out, as in the benchmark.
    """
    wanted = stage_options(number(stage), options)
    setting = Setting.of(HERE["model"], HERE["dtype"], HERE["device"], size, wanted)
    contestant = StageContestant(stage, setting)
    try:
        warm_up(contestant, size, WARMUP_TOKENS["cpu"])
        requests, runs = timed_runs(contestant, size, repeats, lambda run: None, lambda tokens: None)
        return record_runs(short_name(stage), "notebook", requests, runs)
    finally:
        contestant.close()


def measure_prompts(stage: str, lengths: Sequence[int], outputs: int = 16, **options: Any) -> list[Record]:
    """One prompt after the other through one engine, which has seen the longest of these lengths before: with the time
    in attention and the memory of activations. (The clock at every layer costs a CPU nothing that can be measured.)"""

    def alone(length: int) -> Size:
        return Size(uniform(1, (length, length), (outputs, outputs)), 1, max(lengths) + outputs)

    longest = alone(max(lengths))
    wanted = stage_options(number(stage), options)
    setting = Setting.of(HERE["model"], HERE["dtype"], HERE["device"], longest, wanted)
    contestant = StageContestant(stage, setting)
    records: list[Record] = []
    try:
        warm_up(contestant, longest, WARMUP_TOKENS["cpu"])
        for length in lengths:
            clock, memory = contestant.attention_clock(), ActivationPeak(setting.device)
            with memory, clock:
                requests, runs = timed_runs(contestant, alone(length), 1, lambda run: None, lambda tokens: None)
            records.append(record_runs(short_name(stage), "notebook", requests, runs))
            records[-1].attention_time_s, records[-1].peak_activation_bytes = clock.seconds(), memory.bytes
        return records
    finally:
        contestant.close()


def say(text: str) -> None:
    """Show Markdown; a cell that says a figure puts it in with an f-string, so that no figure is typed by hand."""
    _show(textwrap.dedent(text).strip())


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table. The first column stands on the left, the others on the right."""
    lines = [f"| {' | '.join(headers)} |", f"|{'|'.join([':--'] + ['--:'] * (len(headers) - 1))}|"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    say("\n".join(lines))


def compare(records: Sequence[Record], **columns: Callable[[Record], object]) -> None:
    """A table with a row for each record. The columns' names are written with `_` for spaces."""
    names = [name.replace("_", " ") for name in columns]
    table(["stage", *names], [[record.stage, *(column(record) for column in columns.values())] for record in records])


def show_source(*objects: Any) -> None:
    """The code that really runs: each function, method or class, under a link to its file."""
    parts: list[str] = []
    for one in objects:
        path = Path(inspect.getsourcefile(one) or "").resolve().relative_to(ROOT).as_posix()
        code = textwrap.dedent(inspect.getsource(one)).rstrip()
        parts.append(f"`{one.__qualname__}` in [{path}](../{path})\n\n```python\n{code}\n```")
    _show("\n\n".join(parts))


def _show(markdown: str) -> None:
    """In a notebook as Markdown; elsewhere as it is."""
    try:
        from IPython import get_ipython
        from IPython.display import Markdown, display
    except ModuleNotFoundError:
        print(markdown)
        return
    if get_ipython() is None:
        print(markdown)
    else:
        display(Markdown(markdown))
