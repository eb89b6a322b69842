"""Which results there are: every JSON file of a folder, known by its content and never by its name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attention import SCHEMA as ATTENTION
from benchmarks.compare import Results
from benchmarks.environment import ROOT, short_hardware
from common.config import DEFAULT_MODEL
from common.errors import UserError

REPORTS = ROOT / "reports"


@dataclass(frozen=True)
class Bench:
    """A results file of `python -m benchmarks compare`."""

    path: Path
    results: Results


@dataclass(frozen=True)
class Sheet:
    """Any other file: `kind` is `attention`, `quality`, `interop` or `other`, `rows` its measurements."""

    path: Path
    kind: str
    values: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass
class Machine:
    """A folder of results. `benches` are in the order in which a figure is looked for: those that ran with an engine's
    defaults first, then those with more records. left_out: files that nobody here understands, and why."""

    name: str
    title: str
    benches: list[Bench] = field(default_factory=list[Bench])
    sheets: list[Sheet] = field(default_factory=list[Sheet])
    left_out: list[str] = field(default_factory=list[str])

    def sheets_of(self, kind: str) -> list[Sheet]:
        return [sheet for sheet in self.sheets if sheet.kind == kind]

    def bench_of(self, workload: str) -> Bench | None:
        """The file with the most stages and peers on that workload; None where there is no race, but one runner."""

        def runners(bench: Bench) -> int:
            return sum(r.ok and r.workload == workload for r in bench.results.records)

        best = max(self.benches, key=runners, default=None)  # of equals the first
        return best if best is not None and runners(best) > 1 else None

    @property
    def model(self) -> str:
        """What most of its files ran."""
        models = [bench.results.config["model"] for bench in self.benches]
        return max(models, key=models.count, default=DEFAULT_MODEL)

    @property
    def is_gpu(self) -> bool:
        return any(b.results.config["device"].startswith("cuda") for b in self.benches)


def read_machine(folder: Path) -> Machine | None:
    """None where the folder holds no results."""
    machine = Machine(folder.name, folder.name)
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = _recognise(path, values)
        except (ValueError, UserError) as error:
            machine.left_out.append(f"{path.name}: {' '.join(str(error).split())}")
            continue
        if isinstance(found, Bench):
            machine.benches.append(found)
        else:
            machine.sheets.append(found)
    if not machine.benches and not machine.sheets:
        return None
    machine.benches.sort(key=lambda b: (bool(b.results.config.get("options")), -len(b.results.records), b.path.name))
    machine.title = _title(machine)
    return machine


def read_machines(reports: Path = REPORTS) -> dict[str, Machine]:
    """All folders of `reports` that hold results: the kept ones, and `local` first where there is one."""
    folders = [folder for folder in reports.iterdir() if folder.is_dir()]
    folders.sort(key=lambda folder: (folder.name != "local", folder.name))
    found = [machine for folder in folders if (machine := read_machine(folder)) is not None]
    return {machine.name: machine for machine in found}


def _recognise(path: Path, values: Any) -> Bench | Sheet:
    if not isinstance(values, dict):
        raise UserError("no results: not an object")
    if values.get("schema") == ATTENTION:
        return Sheet(path, "attention", values, values["records"])
    if "sweeps" in values:
        results = Results.read(path)
        if results.config.get("quick"):
            raise UserError("quick sizes: a test of the harness, not a measurement")
        return Bench(path, results)
    if isinstance(values.get("ours"), dict) and isinstance(values.get("theirs"), dict):
        return Sheet(path, "interop", values, _interop_rows(values))
    rows = values.get("rows") or values.get("records")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return Sheet(path, "quality" if "perplexity" in rows[0] else "other", values, rows)
    raise UserError("no list of records or rows")


def _interop_rows(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each checkpoint, by whoever wrote it."""
    return [
        {"written by": writer, "checkpoint": name, **found}
        for writer, side in (("m7", "ours"), ("GPTQModel", "theirs"))
        for name, found in values[side].items()
    ]


def _title(machine: Machine) -> str:
    for bench in machine.benches:
        return short_hardware(bench.results.environment, bench.results.config["device"])
    for sheet in machine.sheets:
        if "environment" in sheet.values:
            return short_hardware(sheet.values["environment"], sheet.values.get("config", {}).get("device", "cpu"))
    return machine.name
