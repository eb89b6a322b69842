"""What the bar pictures share: named rows, numbers at the bars, a title that states the finding, a source line."""

from collections.abc import Callable, Sequence

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.environment import short_hardware
from benchmarks.execution import PLAIN, execution_of
from benchmarks.plots.picture import headed
from benchmarks.record import Record
from benchmarks.style import INK, SOFT, STAGE_TITLES, WIDTH, color, title
from benchmarks.table import EXECUTION, rows_for

Value = Callable[[Record], float | None]
Write = Callable[[float | None], str]  # A figure of a record, and how it is written: `3.1 ms`

PALE = 0.4
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}  # behind numbers that a line may cross


def measured(results: Results, workload: str) -> list[Record]:
    return [record for record in rows_for(results, workload) if record.ok]


def measured_both(results: Results, workload: str) -> list[Record]:
    """The same with a row for the idea alone in front of each stage with execution, where the two differ."""
    pairs = [(results.plain_of(record), record) for record in measured(results, workload)]
    return [record for pair in pairs for record in pair if record is not None]


def own(records: Sequence[Record]) -> list[Record]:
    """The stages' records, without peers."""
    return [record for record in records if record.stage in STAGE_TITLES]


def idle(record: Record) -> str:
    """Why the workload gives the stage's idea nothing to do, so that it can only equal the stage before."""
    if record.stage in ("m2", "m3", "m5") and record.itl_by_position:  # recorded of a single request only
        return "one request"
    return "no shared prefix" if record.stage == "m6" and record.tokens_saved == 0 else ""


def headline(
    results: Results, records: Sequence[Record], cost: Callable[[Record], float]
) -> tuple[Record, Record, Record, str] | None:
    """What a title may say: the first stage and the best of the others, leaving out those whose ideas have nothing to
    do, both by the idea alone where that was measured; and the best with execution, and its name."""
    stages = own(records)
    pairs = [(results.plain_of(r) or r, r) for r in stages if r is stages[0] or not idle(r)]
    if len(pairs) < 2:
        return None
    best, whole = min(pairs[1:], key=lambda pair: cost(pair[0]))
    unfair = len(execution_in(results, whole)) > len(execution_in(results, stages[0]))
    return pairs[0][0], best, whole, title(best.stage) + (" with execution" if unfair else "")


def row_notes(results: Results, records: Sequence[Record], workload: str) -> str:
    """What the names of the rows do not explain."""
    note = ""
    if others := [r for r in records if r.workload != workload]:
        note += f" Pale: {others[0].stage} ran {others[0].workload}, since {workload} would take it too long."
    if still := dict.fromkeys(r.stage for r in records[1:] if idle(r)):
        note += f" Pale: this workload gives the idea of {', '.join(still)} nothing to do."
    return note + note_on_execution(results, records)


def note_on_execution(results: Results, records: Sequence[Record]) -> str:
    ways = dict.fromkeys(r.stage for r in records if not r.plain and execution_in(results, r))
    return f" With execution only: {', '.join(ways)}." if ways else ""


def execution_in(results: Results, record: Record) -> list[str]:
    """The ways of execution in its figures, with no row of the idea alone beside them. Files that do not name
    their way are older than most of execution: nothing is said of them."""
    way = results.config.get("execution", PLAIN)
    alone = results.plain_of(record) is not None or way == PLAIN
    return [] if alone or record.stage not in STAGE_TITLES else execution_of(record.stage, results.config["device"])


def runs_of(records: Sequence[Record]) -> str:
    """`the median run` of several, or `one run`; `the median run (m0: the only one)`."""
    runs = {r.stage: len(r.output_tokens_per_s_repeats) for r in own(records) or records}
    single = [stage for stage, count in runs.items() if count < 2]
    if len(single) == len(runs):
        return "one run"
    return "the median run" + (f" ({', '.join(single)}: the only one)" if single else "")


def figure_with_rows(panels: int, rows: int) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, panels, sharey=True, figsize=(WIDTH, 1.9 + 0.62 * rows), squeeze=False)
    return figure, list(axes[0])


def name_rows(axis: plt.Axes, records: Sequence[Record], workload: str) -> None:
    """By the stage's name; `+ execution` behind the row of the idea alone. In brackets: why it is not comparable."""
    notes = [f"ran {r.workload}" if r.workload != workload else idle(r) for r in records]
    notes[0] = notes[0].removeprefix(idle(records[0]))  # what the others are compared with
    names = [title(r.stage) + (f"\n({note})" if note else "") for r, note in zip(records, notes, strict=True)]
    for row in range(1, len(records)):
        names[row] = EXECUTION if records[row - 1].plain else names[row]
    axis.set_yticks(range(len(records)), names)
    axis.set_ylim(len(records) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    for label, record in zip(axis.get_yticklabels(), records, strict=True):
        label.set_color(INK if record.stage in STAGE_TITLES and "(" not in label.get_text() else SOFT)


def bars(
    axis: plt.Axes, records: Sequence[Record], workload: str, value: Value, reach: Value, label: Callable[[Record], str]
) -> None:
    """A bar a row up to `value`, and its label behind the farther of `value` and `reach`, a whisker's end.

    The axis is hidden: the labels say the numbers.
    """
    widest = max([*(reach(r) or value(r) or 0.0 for r in records), 1e-12])
    for row, record in enumerate(records):
        length = value(record)
        if length is None:
            axis.text(widest * 0.015, row, label(record), va="center", color=SOFT)
            continue
        alpha = PALE if record.workload != workload or (row and idle(record)) else 1.0
        axis.barh(row, length, height=0.62, color=color(record.stage), alpha=alpha, linewidth=0)
        end = max(length, reach(record) or 0.0)
        axis.text(end + widest * 0.025, row, label(record), va="center", color=INK)
    axis.set_xlim(0, widest * 1.5)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)


def finish(
    figure: plt.Figure, results: Results, workload: str, records: Sequence[Record], finding: str, how_to_read: str
) -> plt.Figure:
    """The finding on top; below, how to read it, what sets its peers apart, and what was measured where."""
    for name in STAGE_TITLES.values():
        finding = finding.replace(name, name.replace(" ", "\u00a0"))  # no line ends within a name
    config = results.config
    hardware = short_hardware(results.environment, config["device"])
    source = f"{workload} · {config['model']} · {config['dtype']} · {hardware}"
    source += " · QUICK SIZES: A TEST, NOT A MEASUREMENT" if config["quick"] else ""
    # other weights, another type of its KV cache: the source line speaks of the stages
    peers = dict.fromkeys(f"{title(r.stage)}: {r.note}" for r in records if r.stage not in STAGE_TITLES and r.note)
    return headed(figure, finding, how_to_read, *peers, source, size=18, width=74)


def times(value: float) -> str:
    """`2.4 times`, `12 times`."""
    return f"{value:.1f} times" if value < 10 else f"{value:.0f} times"
