"""Figures by name. A claim and a line of the interview guide name what they need; it is looked up in the results.

mixed.m2.output_tokens_per_s                        a field of a record; `last`: the last of several stages there
mixed.m4.plain.output_tokens_per_s                  of the idea alone: of a row without execution, or a file of such
interference[chunk=64].m5.itl_s.p99                 of a point of a sweep
mixed.m2.e2e_s.mean / mixed.m1.e2e_s.mean           a ratio, from one file where one file has both
single.llama.cpp Q4.output_tokens_per_s             of its fastest 4-bit format
single.m7.e2e_s.mean or decode_one.m7.e2e_s.mean    the first of the two that was measured
1 - long_context.m4.ttft_s.p50 / long_context.m3.ttft_s.p50
mixed.m3.output_tokens_per_s@gpu-ladder             of one file, by its name without `.json`
attention.triton.decode 64 × 1024.share             a backend's measurement
batches.m6.64.sampled.output_tokens_per_s           `batches`: stage, requests, way of sampling
quality.bf16.perplexity                             the row of that name, or the only one whose name begins so
reference.vllm.nano                                 an engine that people use, greedy (`benchmarks.report.peers`)
reference.vllm.nano.sampled                         the same at temperature 0.6
reference.limit.nano                                what reading at the rate of a copy would allow

Files with options are read by name only. Of several others that have a figure the one counts in which most stages ran
that workload, then the one with most records, as in the report's tables; of equals, the reader's newest. Kept results
must leave no choice: `UserError`.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.compare import Results
from benchmarks.execution import PLAIN
from benchmarks.gpu import JOBS
from benchmarks.peers import PEERS
from benchmarks.record import Record
from benchmarks.report.peers import GREEDY, MODEL, SAMPLED
from benchmarks.report.sources import Bench, Machine
from benchmarks.table import rate, seconds, size
from benchmarks.workloads import find
from common.config import DEFAULT_MODEL, parse_dtype
from common.errors import UserError, require
from common.memory import kv_bytes_per_token
from common.models.sources.random_weights import PRESETS

SINGLE_TOKENS = 128 + 127  # what `single` leaves in the cache: all but the last token
GPU_BENCH = {workload for part in JOBS["bench"] for workload in part.workloads}
Run = list[float | None]
OF_MACHINE = {"attention": (2,), "batches": (3,), "quality": (1,), "reference": (1, 2)}
"""What begins so is in a file of its own, and not in one of records. With how many names may follow the second."""
BEST_OF_4_BITS = "llama.cpp Q4"
LEVEL = 0.95  # A throughput of this share of the best counts as equal


def _last_quarter(record: Record, first: bool = False) -> float | None:
    """Median time of a token in the last quarter of an answer, or in its first."""
    times = [duration for _, duration in record.itl_by_position or []]
    quarter = len(times) // 4
    return statistics.median(times[:quarter] if first else times[-quarter:]) if quarter else None


def _growth(record: Record, _: Results) -> float | None:
    first, last = _last_quarter(record, first=True), _last_quarter(record)
    return last / first if first and last else None


def _formula(_: Record, results: Results) -> float | None:
    model, dtype = results.config["model"], parse_dtype(results.config["dtype"])
    if model == DEFAULT_MODEL:
        return 2 * 30 * 3 * 64 * dtype.itemsize
    preset = PRESETS.get(model.removeprefix("random:"))
    return None if preset is None else kv_bytes_per_token(preset, dtype)


def _longer_context(record: Record, results: Results) -> float | None:
    """The longest prompt of the sweep over m3's longest in as many bytes of activations, between m3's points."""
    points: dict[str, dict[float, float]] = {}
    for r in results.sweeps:
        if r.ok and r.workload == record.workload and r.variant and r.peak_activation_bytes:
            points.setdefault(r.stage, {})[float(r.variant.split("=")[-1])] = r.peak_activation_bytes
    own, before = points.get(record.stage), sorted(points.get("m3", {}).items())
    if not own or not before:
        return None
    longest = max(own)
    lengths, sizes = zip(*before, strict=True)
    if not sizes[0] <= own[longest] <= sizes[-1]:
        return None
    return longest / np.exp(np.interp(np.log(own[longest]), np.log(sizes), np.log(lengths))).item()


def _sweet_spot(record: Record, results: Results) -> float | None:
    """The smallest chunk that keeps the throughput of the best one."""
    points = {
        int(r.variant.removeprefix("chunk=")): r.output_tokens_per_s
        for r in results.sweeps
        if r.stage == record.stage and r.ok and r.output_tokens_per_s and r.variant and r.variant[6:].isdigit()
    }
    return min((c for c, speed in points.items() if speed >= LEVEL * max(points.values())), default=None)


DERIVED: Mapping[str, Callable[[Record, Results], float | None]] = {
    "itl_first_quarter": lambda record, _: _last_quarter(record, first=True),
    "itl_last_quarter": lambda record, _: _last_quarter(record),
    "itl_growth": _growth,
    "slowest_run": lambda record, _: min(record.output_tokens_per_s_repeats, default=None),
    "fastest_run": lambda record, _: max(record.output_tokens_per_s_repeats, default=None),
    "kv_bytes_per_token": lambda record, _: (record.kv_used_peak_bytes or 0) / SINGLE_TOKENS or None,
    "kv_formula": _formula,
    "padding_bound": lambda record, _: None if record.padding_share is None else 1 / (1 - record.padding_share),
    "longer_context": _longer_context,
    "sweet_spot": _sweet_spot,
}


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


FORMS: Mapping[str, Callable[[float], str]] = {
    "rate": rate,
    "s": seconds,
    "size": size,
    "share": lambda value: f"{value * 100:.1f} %" if 0 < abs(value) < 0.1 else f"{value * 100:.0f} %",
    "signed": lambda value: f"{value * 100:+.1f} %".replace("-", "−"),
    "x": _factor,
    "times": lambda value: f"{_factor(value)}×",
    "n": lambda value: f"{value:,.0f}",
    "us": lambda value: f"{value * 1e6:,.0f} µs",
    "ppl": lambda value: f"{value:.2f}",
}


def alternatives(expression: str) -> list[str]:
    return expression.split(" or ")


def names_in(expression: str) -> list[str]:
    """The figures of a ratio (of the first alternative)."""
    expression = alternatives(expression)[0]
    return [name.strip() for name in expression.removeprefix("1 - ").removesuffix(" - 1").split(" / ")]


def workload_of(expression: str) -> str:
    return names_in(expression)[0].split(".")[0].partition("[")[0]


def evaluate(machine: Machine, expression: str) -> float | None:
    """The value on that machine; None where something was not measured. `UserError` for a name that cannot exist."""
    values = [_evaluate(machine, alternative) for alternative in alternatives(expression)]
    return next((value for value in values if value is not None), None)


def _evaluate(machine: Machine, expression: str) -> float | None:
    expression, _, file = expression.partition("@")
    machine = machine.file(file) if file else machine
    names = names_in(expression)
    of_bench = any(name.partition(".")[0] not in OF_MACHINE for name in names)
    ways = ("default", PLAIN) if any(".plain." in name for name in names) else ("default",)
    benches = [b for b in machine.benches if file or b.way in ways] if of_bench else [None]
    if any(name.startswith("reference.") for name in names):  # of one model
        benches = [b for b in benches if b is None or b.results.config["model"] == MODEL]
    found = [(bench, [_look_up(machine, name, bench) for name in names]) for bench in benches]
    chosen = _one(machine, expression, [(bench, run) for bench, run in found if None not in run])
    numbers = [value for value in chosen or [] if value is not None]
    if not numbers or (len(numbers) == 2 and not numbers[1]):
        return None
    result = numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1]
    result = 1 - result if expression.startswith("1 - ") else result
    return result - 1 if expression.endswith(" - 1") else result


def _one(machine: Machine, expression: str, found: list[tuple[Bench | None, Run]]) -> Run | None:
    """What is found, in the file in which it counts (see above); a ratio never takes its halves from two files."""

    def rank(bench: Bench) -> tuple[int, int]:
        head = names_in(expression)[0].split(".")[0]
        ran = [record for record in _runners(bench.results, head) if record.stage not in PEERS]
        return len(ran), len(bench.results.records)

    benches = {bench.path: bench for bench, _ in found if bench is not None}
    best = [path for path, bench in benches.items() if rank(bench) == max(map(rank, benches.values()))]
    if machine.folder != "local" and len(best) > 1:
        names = " or ".join(f"@{path.stem}" for path in best)
        raise UserError(f"{expression}: several files of {machine.name} have it. Name one: {names}")
    newest = max(best, key=lambda path: path.stat().st_mtime, default=None)
    return next((value for bench, value in found if bench is None or bench.path == newest), None)


def show(value: float, form: str) -> str:
    require(form in FORMS, f"no form {form!r} of figures. Choose from: {', '.join(FORMS)}")
    return FORMS[form](value)


def command_for(expression: str, gpu: bool, model: str = DEFAULT_MODEL) -> str:
    """What measures it."""
    workload = workload_of(expression)
    if workload == "attention":
        return "python -m benchmarks attention"
    if workload == "quality":
        return "make stage7 quality"
    if workload == "batches":
        return "python -m benchmarks batches"
    if gpu and model == MODEL:  # the jobs for a GPU run these
        if GPU_BENCH & {workload_of(alternative) for alternative in alternatives(expression)}:
            return "make gpu-bench"
        if workload == "mixed":
            return "make gpu-ladder"
    alone = any(".plain." in name for name in names_in(expression))
    swept = any("[" in name or name.endswith((".sweet_spot", ".longer_context")) for name in names_in(expression))
    options = [*(["SWEEP=1"] if swept else []), *(["DEVICE=cuda"] if gpu else [])]
    options += ["EXECUTION=plain"] if alone and gpu and not find(workload).ladder else []
    options += [f"MODEL={model}"] if model != DEFAULT_MODEL else []
    return " ".join([f"make bench WORKLOAD={workload}", *options])


def _look_up(machine: Machine, name: str, bench: Bench | None) -> float | None:
    head, *parts = name.split(".")
    named = (peer for peer in (*PEERS, BEST_OF_4_BITS) if name.startswith(f"{head}.{peer}."))
    stage = next(named, parts[0] if parts else "")
    fields = name.removeprefix(f"{head}.{stage}").split(".")[1:]
    if not fields or len(fields) not in OF_MACHINE.get(head, [len(fields)]):
        raise UserError(f"{name!r} is no name of a figure: see benchmarks/report/figures.py")
    if head == "attention":
        return _sheet_value(machine, head, fields[1], {"backend": stage, "step": fields[0]})
    if head == "batches":
        return _sheet_value(machine, head, fields[2], {"stage": stage, "batch": fields[0], "sampling": fields[1]})
    if head == "quality":
        return _sheet_value(machine, head, fields[0], {"name": stage})
    if head == "reference":
        return _reference(machine, name, stage, *fields)
    record = None if bench is None else find_record(bench.results, head, stage)
    if record is None or bench is None:
        return None
    if fields[0] == "plain":
        record, fields = record if bench.way == PLAIN else bench.results.plain_of(record), fields[1:]
    return None if record is None else _field(record, bench.results, fields)


def _reference(machine: Machine, name: str, engine: str, workload: str, how: str = "greedy") -> float | None:
    require(how in ("greedy", "sampled"), f"{name}: 'sampled', or nothing for greedy")
    if engine == "limit":
        return _sheet_value(machine, "limits", "output_tokens_per_s", {"workload": workload})
    return machine.peers and machine.peers.speed(engine, workload, GREEDY if how == "greedy" else SAMPLED)


def _runners(results: Results, head: str) -> list[Record]:
    """Of a workload or a point of a sweep, as an expression names it: what ran there."""
    workload, _, variant = head.rstrip("]").partition("[")
    there = results.sweeps if variant else results.records
    return [r for r in there if r.ok and r.workload == workload and (r.variant or "") == variant]


def find_record(results: Results, head: str, stage: str) -> Record | None:
    there = _runners(results, head)
    if stage == "last":
        own = [r for r in there if r.stage[0] == "m" and r.stage[1:].isdigit()]
        return max(own, key=lambda r: int(r.stage[1:])) if len(own) > 1 else None
    if stage == BEST_OF_4_BITS:
        return max((r for r in there if stage in r.stage), key=lambda r: r.output_tokens_per_s or 0, default=None)
    return next((r for r in there if r.stage == stage), None)


def _field(record: Record, results: Results, fields: list[str]) -> float | None:
    if fields[0] in DERIVED:
        return DERIVED[fields[0]](record, results)
    require(hasattr(record, fields[0]), f"a record has no {fields[0]!r}: see benchmarks/record.py")
    value: Any = getattr(record, fields[0])
    for key in fields[1:]:
        value = value.get(key) if value is not None else None
    return value


def _sheet_value(machine: Machine, kind: str, field: str, wanted: dict[str, str]) -> float | None:
    """A field of the row that has these values, or whose values begin so; `UserError` if several do."""
    rows = [(sheet.path.name, row) for sheet in machine.sheets_of(kind) for row in sheet.rows]
    fits = [[str(row.get(key)).startswith(value) for key, value in wanted.items()] for _, row in rows]
    found = [row for row, fit in zip(rows, fits, strict=True) if all(fit)]  # with its file
    found = [(path, row) for path, row in found if wanted.items() <= row.items()] or found
    names = "; ".join(f"{path}: {', '.join(str(row[key]) for key in wanted)}" for path, row in found)
    message = f"{kind}.{'.'.join(wanted.values())} could be several rows of {machine.name} ({names})"
    require(len(found) < 2, f"{message}: write a whole name, or name the file with @FILE")
    return found[0][1].get(field) if found else None
