"""What the notebooks share: measuring a stage, drawing, showing source, and writing figures into text."""

import inspect
import os
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestant import Setting
from benchmarks.plots.bars import bars, figure_with_rows, name_rows
from benchmarks.plots.picture import save_picture
from benchmarks.recipes import timed, total_output, uniform
from benchmarks.record import Record, record_runs
from benchmarks.stage_contestant import StageContestant
from benchmarks.style import RC, color
from benchmarks.table import rate, seconds
from benchmarks.worker import WARMUP_TOKENS, timed_runs, warm_up
from benchmarks.workloads import Size
from common.cli.options import fastest_dtype
from common.config import DEFAULT_MODEL, stage_options
from common.watch.peak_memory import ActivationPeak
from common.watch.progress import progress_bar
from notebooks.pairs import ROOT
from notebooks.progress import show_progress
from stages import number, short_name

HERE: dict[str, Any] = {"model": DEFAULT_MODEL, "dtype": fastest_dtype("cpu"), "device": "cpu"}
"""The options of every engine that a notebook builds: `stages.build("m1", **HERE)`."""

T = TypeVar("T")
Value = Callable[[Record], float | None]
plt.rcParams.update(RC)
show_progress()


def measure(stage: str, size: Size, **options: Any) -> Record:
    """Run a workload on a stage as `make bench` does, but in this process: build, warm up, run, write down.

    options: further engine options; one that the stage does not have yet is left out, as in the benchmark.
    """
    with _warm(stage, size, options) as contestant:
        return _run(stage, contestant, size)


def measure_prompts(stage: str, lengths: Sequence[int], outputs: int = 16, **options: Any) -> list[Record]:
    """One prompt after the other through one engine, warmed up with the longest: with the time in attention and the
    memory of activations. (The clock at every layer costs a CPU nothing that can be measured.)"""

    def alone(length: int) -> Size:
        return Size(uniform(1, (length, length), (outputs, outputs)), 1, max(lengths) + outputs)

    records: list[Record] = []
    with _warm(stage, alone(max(lengths)), options) as contestant:
        for length in lengths:
            clock, memory = contestant.attention_clock(), ActivationPeak(torch.device("cpu"))
            with memory, clock:
                records.append(_run(stage, contestant, alone(length)))
            records[-1].attention_time_s, records[-1].peak_activation_bytes = clock.seconds(), memory.bytes
    return records


@contextmanager
def _warm(stage: str, size: Size, options: Mapping[str, Any]) -> Generator[StageContestant]:
    wanted = stage_options(number(stage), options)
    setting = Setting.of(HERE["model"], HERE["dtype"], HERE["device"], size, wanted)
    with closing(StageContestant(stage, setting)) as contestant:
        with progress_bar(f"{stage}: warming up", 1):
            warm_up(contestant, size, WARMUP_TOKENS["cpu"])
        yield contestant


def _run(stage: str, contestant: StageContestant, size: Size) -> Record:
    total = total_output(timed(size.requests(contestant.vocab_size)))
    with progress_bar(f"{stage}: output tokens", total) as advance:
        requests, runs = timed_runs(contestant, size, 1, lambda run: None, advance)
    return record_runs(short_name(stage), "notebook", requests, runs)


def read_bandwidth() -> float:
    """Bytes a second at which this machine reads memory: the best of six sums over more than any cache holds."""
    memory, times = torch.ones(2**26), list[float]()
    for _ in range(6):
        started = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - started)
    return memory.nbytes / min(times)


def draw_lines(axis: Axes, heading: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Curves above 0, each with its name at its end and, where that is a stage, in the stage's colour."""
    highest = max(y[-1] for _, y in lines.values())
    for name, (x, y) in lines.items():
        axis.plot(x, y, marker="o" if len(x) < 10 else None, linewidth=3, color=color(name))
        axis.annotate(name, (x[-1], y[-1]), xytext=(8, 0), textcoords="offset points", color=color(name),
                      fontweight="bold", va="bottom" if y[-1] == highest else "top", annotation_clip=False)  # fmt: skip
    axis.set_ylim(0, None)
    axis.set_title(heading, loc="left", pad=20)
    axis.grid(axis="y", color="#E4E4E4")


def draw_bars(records: Sequence[Record], panels: Mapping[str, tuple[Value, Callable[[Any], str]]]) -> None:
    """A row for each record. panels: what is drawn, by heading, and how its figures are written."""
    figure, axes = figure_with_rows(len(panels), len(records))
    figure.set_size_inches(14, 5)
    for axis, (heading, (value, write)) in zip(axes, panels.items(), strict=True):
        bars(axis, records, "notebook", value, lambda r: None, lambda r, v=value, w=write: w(v(r)))
        axis.set_title(heading, loc="left")
        axis.tick_params(axis="y", length=0)
    name_rows(axes[0], records, "notebook")
    figure.tight_layout(w_pad=2)
    plt.show()


def show_picture(draw: Callable[[], Figure]) -> None:
    """Show a picture as the harness writes it into a file."""
    from IPython.display import Image, display

    with tempfile.TemporaryDirectory() as folder:
        display(Image(data=save_picture(Path(folder) / "picture.png", draw).read_bytes()))


def say(text: str) -> None:
    """Show Markdown; figures come in through f-strings, so that none is typed by hand."""
    from IPython.display import Markdown, display

    display(Markdown(textwrap.dedent(text).strip()))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table. The first column is aligned left, the others right."""
    lines = [f"| {' | '.join(headers)} |", f"|{'|'.join([':--'] + ['--:'] * (len(headers) - 1))}|"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    say("\n".join(lines))


COLUMNS: Mapping[str, Callable[[Any], object]] = {
    "output tokens/s": lambda r: rate(r.output_tokens_per_s),
    "first token": lambda r: seconds(r.ttft_s["p50"]),
    "each further token": lambda r: seconds(r.itl_s["p50"]),
    "end, mean": lambda r: seconds(r.e2e_s["mean"]),
    "requests at once": lambda r: r.peak_running,
    "KV slots filled": lambda r: f"{r.kv_utilization:.0%}" if r.kv_utilization else "",
    "wasted positions": lambda r: f"{r.padding_share:.0%}",
}


def compare(records: Sequence[Record], *names: str, **own: Callable[[Any], object]) -> None:
    """A table with a row for each record. names: of `COLUMNS`; own: further ones, with `_` for the spaces of a name."""
    columns = {name: COLUMNS[name] for name in names} | {name.replace("_", " "): own[name] for name in own}
    table(["stage", *columns], [[record.stage, *(column(record) for column in columns.values())] for record in records])


def change(new: float, old: float) -> str:
    """`+4%`, `-13%`, `±0%`."""
    text = f"{new / old - 1:+.0%}"
    return "±0%" if text[1:] == "0%" else text


def each(what: str, items: Collection[T]) -> Iterator[T]:
    """The items one by one, with progress under the cell."""
    with progress_bar(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


def show_source(*objects: Any) -> None:
    """The code that runs: each function, method or class, under a link to its file."""
    parts: list[str] = []
    for one in objects:
        file = Path(inspect.getsourcefile(one) or "").resolve()
        path, link = file.relative_to(ROOT).as_posix(), Path(os.path.relpath(file)).as_posix()
        code = textwrap.dedent(inspect.getsource(one)).rstrip()
        parts.append(f"`{one.__qualname__}` in [{path}]({link})\n\n```python\n{code}\n```")
    say("\n\n".join(parts))
