"""Which results there are: every JSON file of a folder, recognised by its content and never by its name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.attention import SCHEMA as ATTENTION
from benchmarks.batches import SCHEMA as BATCHES
from benchmarks.compare import Results
from benchmarks.environment import ROOT, short_hardware
from benchmarks.limits import SCHEMA as LIMITS
from benchmarks.peers import PEERS
from benchmarks.report.peers import MODEL, Peers, read_peers
from common.config import DEFAULT_MODEL
from common.errors import UserError, require

REPORTS = ROOT / "reports"
FIRST = ("local", "cpu", "h200")
"""Folders that a report begins with: the reader's own, and the two kept machines that the texts are about."""


@dataclass(frozen=True)
class Bench:
    """A results file of `python -m benchmarks compare`."""

    path: Path
    results: Results

    @property
    def way(self) -> str:
        """How the engines ran: as by `default`, `plain` (without execution), or with `options`."""
        config = self.results.config
        return "options" if config.get("options") else config.get("execution") or "default"


@dataclass(frozen=True)
class Sheet:
    """Any other file: `kind` is `attention`, `batches`, `quality`, `limits`, `interop` or `other`, `rows` its
    measurements."""

    path: Path
    kind: str
    values: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass
class Machine:
    """The results of a folder, of one device: a folder with runs on the CPU and on a GPU is two.

    benches: those that ran with an engine's defaults first, then those with more records. peers: engines that people
    use, on such a GPU. left_out: files and figures that are no results, and why. prefix: of its pictures.
    """

    name: str
    title: str
    prefix: str = ""
    benches: list[Bench] = field(default_factory=list[Bench])
    sheets: list[Sheet] = field(default_factory=list[Sheet])
    left_out: list[str] = field(default_factory=list[str])
    peers: Peers | None = None

    @property
    def folder(self) -> str:
        """Its name, where a folder holds one machine."""
        return self.name.removesuffix("-gpu") if self.prefix else self.name

    def sheets_of(self, kind: str) -> list[Sheet]:
        return [sheet for sheet in self.sheets if sheet.kind == kind]

    def file(self, name: str) -> Self:
        """The machine with only the results of one file."""
        benches = [bench for bench in self.benches if bench.path.stem == name]
        return replace(self, benches=benches, sheets=[sheet for sheet in self.sheets if sheet.path.stem == name])

    def bench_of(self, workload: str) -> Bench | None:
        """The file with the most stages on that workload, then peers; None where there is no race, but one runner."""

        def runners(bench: Bench) -> tuple[int, int]:
            ran = [r.stage for r in bench.results.records if r.ok and r.workload == workload]
            return len(set(ran) - PEERS.keys()), len(ran)

        best = max(self.benches, key=runners, default=None)  # of equals the first
        return best if best is not None and runners(best)[1] > 1 else None

    @property
    def model(self) -> str:
        """What most of its files ran."""
        models = [bench.results.config["model"] for bench in self.benches]
        return max(models, key=models.count, default=DEFAULT_MODEL)

    @property
    def is_gpu(self) -> bool:
        return any(_on_gpu(bench.results.config) for bench in self.benches)


def kept(machines: Mapping[str, Machine]) -> dict[str, Machine]:
    """Those whose results are part of the repository."""
    return {name: machine for name, machine in machines.items() if machine.folder != "local"}


def read_folder(folder: Path) -> list[Machine]:
    """What a folder holds: nothing, one machine, or its results on the CPU and on the GPU as two."""
    found = Machine(folder.name, folder.name)
    for path in sorted(folder.glob("*.json")):
        try:
            one = _recognise(path, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, UserError) as error:
            found.left_out.append(f"{path.name}: {' '.join(str(error).split())}")
            continue
        if isinstance(one, Bench):
            found.benches.append(one)
            found.left_out += [f"{path.name}: {reason}" for reason in _drop_impossible(one.results)]
        else:
            found.sheets.append(one)
    if not found.benches and not found.sheets:
        return []
    on_gpu = [bench for bench in found.benches if _on_gpu(bench.results.config)]
    machines = [found]
    if on_gpu and len(on_gpu) < len(found.benches):
        sheets = [sheet for sheet in found.sheets if _on_gpu(sheet.values.get("config", {}))]
        machines.append(Machine(f"{found.name}-gpu", "", "gpu-", on_gpu, sheets))
        found.benches = [bench for bench in found.benches if bench not in on_gpu]
        found.sheets = [sheet for sheet in found.sheets if sheet not in sheets]
    for machine in machines:
        machine.benches.sort(key=lambda b: (b.way != "default", -len(b.results.records), b.path.name))
        gpus = [b.results.environment["hardware"]["gpu"] for b in machine.benches if b.results.config["model"] == MODEL]
        machine.peers = read_peers(folder.parent / "peers", gpus[0]) if machine.is_gpu and gpus else None
        machine.title = _title(machine) + (" (yours)" if folder.name == "local" else "")
    return machines


def _drop_impossible(results: Results) -> Iterator[str]:
    """Takes away impossible times in attention; yields a reason for each."""
    for record in [*results.records, *results.sweeps, *results.plain]:
        if record.attention_is_impossible and record.e2e_s:
            point = f"{record.workload}{f'[{record.variant}]' if record.variant else ''}.{record.stage}"
            spent = f"{record.attention_time_s:.1f} s in attention, and its requests took {record.e2e_s['max']:.1f} s"
            record.attention_time_s = None
            yield f"{point}: {spent}: measure it again"


def _on_gpu(config: Mapping[str, Any]) -> bool:
    return str(config.get("device", "cpu")).startswith("cuda")


def read_machines(reports: Path = REPORTS) -> dict[str, Machine]:
    """All folders of `reports` that hold results: `local` and the kept ones."""
    folders = [folder for folder in reports.iterdir() if folder.is_dir()]
    folders.sort(key=lambda folder: (FIRST.index(folder.name) if folder.name in FIRST else len(FIRST), folder.name))
    found = [machine for folder in folders for machine in read_folder(folder)]
    return {machine.name: machine for machine in found}


def _recognise(path: Path, values: Any) -> Bench | Sheet:
    if not isinstance(values, dict):
        raise UserError("no results: not an object")
    if values.get("schema") == ATTENTION:
        return Sheet(path, "attention", values, values["records"])
    if "sweeps" in values:
        results = Results.read(path)
        require(not results.config.get("quick"), "quick sizes: a test of the harness, not a measurement")
        return Bench(path, results)
    if isinstance(values.get("ours"), dict) and isinstance(values.get("theirs"), dict):
        sides = {"m7": values["ours"], "GPTQModel": values["theirs"]}
        rows = [{"written by": w, "checkpoint": name, **row} for w, side in sides.items() for name, row in side.items()]
        return Sheet(path, "interop", values, rows)
    rows = values.get("rows") or values.get("records")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        schema = values.get("schema")
        kinds = {"quality": "perplexity" in rows[0], "limits": schema == LIMITS, "batches": schema == BATCHES}
        return Sheet(path, next((kind for kind, fits in kinds.items() if fits), "other"), values, rows)
    raise UserError("no list of records or rows")


def _title(machine: Machine) -> str:
    runs = [(b.results.environment, b.results.config) for b in machine.benches]
    runs += [(s.values["environment"], s.values.get("config", {})) for s in machine.sheets if "environment" in s.values]
    return short_hardware(runs[0][0], runs[0][1].get("device", "cpu")) if runs else machine.name
