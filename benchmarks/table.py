"""The comparison as a table for the terminal: one for each workload that was asked for."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.compare import Results
from benchmarks.environment import short_hardware
from benchmarks.peers import PEERS
from benchmarks.recipes import LONG, SHORT
from benchmarks.record import Record, Summary
from benchmarks.style import title
from benchmarks.workloads import find

DASH = "–"
FAILED = "failed"
EXECUTION = "+ execution"


def rows_for(results: Results, workload: str) -> list[Record]:
    """The records that answer for a workload: its own, and m0's on the workload that it ran in its place."""
    stand_in = find(workload).m0_runs
    return [r for r in results.records if r.workload == workload or (r.stage == "m0" and r.workload == stand_in)]


def seconds(value: float | None) -> str:
    """`3.1 ms`, `420 ms`, `2.4 s`."""
    if value is None:
        return DASH
    if value >= 1:
        return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    return f"{value * 1000:.1f} ms" if value < 0.0995 else f"{value * 1000:.0f} ms"


def size(value: float | None) -> str:
    """`12 MB`, `1.4 GB`: powers of 1000."""
    if value is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            number = value / scale
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{value / 1e3:.0f} kB"


def rate(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def factor(record: Record, reference: Record | None) -> str:
    """How many times the reference's output tokens per second; `≈` where the two ran different workloads."""
    if reference is None or reference is record or not record.output_tokens_per_s or not reference.output_tokens_per_s:
        return DASH
    times = record.output_tokens_per_s / reference.output_tokens_per_s
    sign = "" if record.workload == reference.workload else "≈"
    return f"{sign}{times:.2f}" if times < 10 else f"{sign}{times:.0f}"


def _percentiles(summary: Summary | None, unit: float, *names: str) -> str:
    """The named percentiles, about three digits each. unit: in seconds."""
    if summary is None:
        return DASH
    values = [summary[name] / unit for name in names]
    return " / ".join(f"{v:.0f}" if v >= 100 else f"{v:.1f}" if v >= 1 else f"{v:.2f}" for v in values)


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}"


def _kv(record: Record) -> str:
    held = record.kv_reserved_bytes
    return f"{size(record.kv_used_peak_bytes)} / {size(held)}" if held else DASH


def speed(record: Record) -> str:
    """Tokens per second with half the distance between the slowest and the fastest run."""
    runs = record.output_tokens_per_s_repeats
    spread = f" ±{(max(runs) - min(runs)) / 2 / max(runs):.0%}" if len(runs) > 1 else ""
    return rate(record.output_tokens_per_s) + spread


COLUMNS = ("stage", "output\ntokens/s", "× stage\nbefore", "\n× m0", "TTFT, s\np50", "ITL, ms\np50 / p99",
           "E2E, s\np50 / p99", "peak\nmemory")  # fmt: skip
Column = tuple[str, Callable[[Record], str]]
Rows = tuple[list[str], list[list[str]]]  # headings, and the cells of each row


def _long_and_short(record: Record) -> str:
    groups = record.ttft_by_group or {}
    return f"{_percentiles(groups.get(LONG), 1e-3, 'p50')} / {_percentiles(groups.get(SHORT), 1e-3, 'p50')}"


LAST_COLUMNS: dict[str, tuple[Column, ...]] = {
    "kv": (
        ("KV at peak\nused / reserved", _kv),
        ("KV mean\nuse", lambda r: _share(r.kv_utilization)),
        ("\npadding", lambda r: _share(r.padding_share)),
    ),
    "probe": (
        ("attention,\nin all", lambda r: seconds(r.attention_time_s)),
        ("activations,\npeak", lambda r: size(r.peak_activation_bytes)),
    ),
    "stalls": (
        ("ITL, ms\nmax", lambda r: _percentiles(r.itl_s, 1e-3, "max")),
        ("TTFT, ms\nlong / short", _long_and_short),
    ),
    "prefill": (("prompt\ntokens/s", lambda r: rate(r.prompt_tokens_per_s)),),
    "prefix": (
        ("TTFT, ms\np50 / p99", lambda r: _percentiles(r.ttft_s, 1e-3, "p50", "p99")),
        ("prefix\nhits", lambda r: _share(r.prefix_hit_rate)),
        ("tokens\nsaved", lambda r: count(r.tokens_saved)),
        ("blocks shared\n/ evicted", lambda r: f"{count(r.blocks_shared)} / {count(r.evictions)}"),
    ),
}
"""By `Workload.columns`. The KV cache of a single request says little, nor does it tell of stalls or of sharing."""

_SPEED: Column = ("output tokens/s", lambda r: rate(r.output_tokens_per_s))
SWEEP_FIGURES = {
    **{"kv": _SPEED, "probe": _SPEED, "prefill": _SPEED},
    "stalls": ("p99 time between tokens", lambda r: seconds(r.itl_s["p99"] if r.itl_s else None)),
    "prefix": ("median time to the first token", lambda r: seconds(r.ttft_s["p50"] if r.ttft_s else None)),
}
"""What the table of a sweep shows, by `Workload.columns`."""


def workload_rows(results: Results, workload: str) -> Rows:
    """One row for each stage and peer."""
    last, records, rows = LAST_COLUMNS[find(workload).columns], rows_for(results, workload), list[list[str]]()
    baseline = next((r for r in records if r.stage == "m0"), None)
    before: Record | None = None
    for record in records:
        if (plain := results.plain_of(record)) is not None:
            rows.append(_row(plain.stage, plain, before, baseline, last))
        name = record.stage.replace("-", "-\n") if plain is None else EXECUTION
        name += "" if record.workload == workload else f" on {record.workload}"
        rows.append(_row(name, record, plain or before, baseline, last))
        if record.ok and record.stage not in PEERS:
            before = plain or record
    return [*COLUMNS, *(heading for heading, _ in last)], rows


def _row(
    name: str, record: Record, before: Record | None, baseline: Record | None, last: Sequence[Column]
) -> list[str]:
    if not record.ok:
        return [name, FAILED, *[""] * (len(COLUMNS) + len(last) - 2)]
    return [
        name,
        speed(record),
        DASH if record.stage in PEERS else factor(record, before),
        factor(record, baseline),
        _percentiles(record.ttft_s, 1, "p50"),
        _percentiles(record.itl_s, 1e-3, "p50", "p99"),
        _percentiles(record.e2e_s, 1, "p50", "p99"),
        size(record.peak_device_memory_bytes or record.peak_memory_bytes),
        *(tell(record) for _, tell in last),
    ]


def footnotes(records: Sequence[Record], plain: bool = False) -> list[str]:
    """What a row cannot say: why it failed, and what it ran instead."""
    notes = [f"{r.stage}: {r.note}" for r in records if r.ok and r.note]
    if plain:
        what = "fused or compiled kernels, CUDA graphs, planning ahead"
        notes.append(f"{EXECUTION}: {what}; × the idea alone (the row above)")
    if any("instead" in note for note in notes):
        notes.append("≈ compares two different workloads: take it as an order of magnitude")
    return notes + [f"{r.stage} failed: {r.error}" for r in records if not r.ok]


def render(results: Results) -> Group:
    """All tables with their notes, and the sweeps in brief."""
    parts: list[Table | Text] = []
    config = results.config
    where = f"{config['model']} · {config['dtype']} · {short_hardware(results.environment, config['device'])}"
    for workload in config["workloads"]:
        records = rows_for(results, workload)
        heading = f"[bold]{workload}[/]: {find(workload).description}\n{where}"
        parts += [Text(), _table(heading, workload_rows(results, workload))]
        notes = footnotes(records, any(results.plain_of(record) for record in records))
        parts += [Text(note, style="red" if " failed: " in note else "dim") for note in notes]
    for workload in dict.fromkeys(r.workload for r in results.sweeps):
        what, _ = SWEEP_FIGURES[find(workload).columns]
        parts += [Text(), _table(f"[bold]sweep of {workload}[/]: {what}", sweep_rows(results, workload))]
    failed = [r for r in results.sweeps if not r.ok]
    parts += [Text(f"{r.stage} failed at {r.variant}: {r.error}", style="red") for r in failed]
    return Group(*parts)


def _table(title: str, rows: Rows) -> Table:
    look: Any = {"title_justify": "left", "title_style": "", "header_style": "bold", "box": None, "pad_edge": False}
    table = Table(title=title, **look, min_width=60)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows[1]:
        table.add_row(*(f"[red]{FAILED}[/]" if cell == FAILED else cell for cell in row))
    return table


def sweep_rows(results: Results, workload: str) -> Rows:
    """A row for each point of the sweep, a column for each contestant."""
    sweeps = [r for r in results.sweeps if r.workload == workload]
    _, tell = SWEEP_FIGURES[find(workload).columns]
    names, rows = list(dict.fromkeys(r.stage for r in sweeps)), list[list[str]]()
    for variant in dict.fromkeys(r.variant for r in sweeps):
        here = {r.stage: r for r in sweeps if r.variant == variant}
        cells = [DASH if name not in here else tell(here[name]) if here[name].ok else FAILED for name in names]
        rows.append([variant or "", *cells])
    return ["point", *map(title, names)], rows
