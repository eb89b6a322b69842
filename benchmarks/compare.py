"""The comparison: every contestant on every workload, each in a fresh process, written down as results come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stages
from benchmarks.environment import environment
from benchmarks.files import read_json, write_json
from benchmarks.peers import PEERS
from benchmarks.process import OnMessage, run_worker
from benchmarks.record import SCHEMA, Record
from benchmarks.worker import Job
from benchmarks.workloads import Workload, find
from common.config import EngineConfig, parse_device
from common.errors import UserError
from common.models.load import open_source

M0_NOTE = "m0 ran `{}` instead: `{}` would take it too long"


@dataclass
class Comparison:
    """What to compare. `contestants`: short stage names and peers' names, in the order of the table."""

    contestants: list[str]
    workloads: list[str]
    model: str
    dtype: str
    device: str
    quick: bool = False
    sweep: bool = False
    repeats: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def preset(self) -> str:
        return "quick" if self.quick else "gpu" if self.device.startswith("cuda") else "cpu"

    def config(self) -> dict[str, Any]:
        return {**vars(self), "preset": self.preset}


def contestants(names: Sequence[str], peers: bool) -> list[str]:
    """Short names of stages and peers, in order, each once; no names: all stages."""
    chosen = [name if name in PEERS else stages.short_name(name) for name in names]
    peers_in_order = list(PEERS)
    chosen.sort(key=lambda n: (1 + peers_in_order.index(n) if n in PEERS else 0, n))
    chosen = chosen or [stages.short_name(f) for f in stages.names()]
    return list(dict.fromkeys(chosen + (peers_in_order if peers else [])))


def make_comparison(
    names: Sequence[str],
    workloads: Sequence[str],
    *,
    peers: bool,
    model: str,
    dtype: str,
    device: str,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Comparison:
    """Checks names, options and the model (without reading its weights) before anything runs: `UserError`."""
    if not workloads:
        raise UserError("no workload was named: leave out --workload, or see `python -m benchmarks workloads`")
    for workload in workloads:
        find(workload)
    chosen = contestants(names, peers)
    place = parse_device(device)
    options = dict(options or {})
    for name in ("model", "dtype", "device"):
        if name in options:
            raise UserError(f"--engine cannot set {name}, which peers need too: use --{name}")
    EngineConfig(model=model, dtype=dtype, device=place, **options)
    open_source(model, place)
    return Comparison(chosen, list(dict.fromkeys(workloads)), model, dtype, str(place), options=options, **rest)


def jobs(plan: Comparison) -> Iterator[Job]:
    """One for each (contestant, workload), headlines first, then the points of the sweeps."""
    seen: set[tuple[str, str]] = set()
    for name in plan.workloads:
        for stage in plan.contestants:
            workload, note = _substitute(stage, find(name))
            if (stage, workload.name) not in seen:
                seen.add((stage, workload.name))
                yield _job(plan, stage, workload, None, note)
    for name in plan.workloads if plan.sweep else ():
        workload = find(name)
        for number, variant in enumerate(workload.variants_for(plan.preset)):
            for stage in plan.contestants:
                limit = workload.m0_variants if stage == "m0" else None
                left_out = workload.stages_only if stage in PEERS else stages.number(stage) < workload.variants_from
                if not left_out and (limit is None or number < limit):
                    yield _job(plan, stage, workload, variant, None)


def _substitute(stage: str, workload: Workload) -> tuple[Workload, str | None]:
    if stage != "m0" or workload.m0_runs is None:
        return workload, None
    return find(workload.m0_runs), M0_NOTE.format(workload.m0_runs, workload.name)


def _job(plan: Comparison, stage: str, workload: Workload, variant: str | None, note: str | None) -> Job:
    repeats = plan.repeats or (1 if stage == "m0" else workload.repeats)
    return Job(
        stage,
        workload.name,
        plan.preset,
        plan.model,
        plan.dtype,
        plan.device,
        repeats,
        variant,
        note,
        dict(plan.options),
    )


@dataclass
class Results:
    """The contents of bench.json."""

    environment: dict[str, Any]
    config: dict[str, Any]
    records: list[Record] = field(default_factory=list[Record])
    sweeps: list[Record] = field(default_factory=list[Record])
    took_s: float | None = None  # all jobs, loading and warming up included; None in older files

    def add(self, record: Record) -> None:
        (self.sweeps if record.variant else self.records).append(record)

    def find(self, job: Job) -> Record | None:
        for record in self.sweeps if job.variant else self.records:
            if (record.stage, record.workload, record.variant) == (job.stage, job.workload, job.variant):
                return record
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "config": self.config,
            "took_s": self.took_s,
            "records": [record.to_json() for record in self.records],
            "sweeps": [record.to_json() for record in self.sweeps],
        }

    @classmethod
    def read(cls, path: str | Path) -> Results:
        value = read_json(path)
        try:
            found = [[Record(**record) for record in value[key]] for key in ("records", "sweeps")]
            where, config = value["environment"], value["config"]
            if not isinstance(where, dict) or not isinstance(config, dict):
                raise TypeError("environment and config are objects")
            return cls(where, config, *found, value.get("took_s"))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} was written by another version of the bench ({error}): run it again") from error


RESUME_NEEDS = ("model", "dtype", "device", "quick", "repeats", "options")


def earlier_results(plan: Comparison, path: Path) -> Results | None:
    """What an interrupted run of the same comparison has left; `UserError` if it was another comparison."""
    if not path.exists():
        return None
    old = Results.read(path)
    changed = [key for key in RESUME_NEEDS if old.config.get(key) != plan.config()[key]]
    if changed:
        raise UserError(f"{path} was measured with other values of {', '.join(changed)}: leave out --resume")
    if _origin(old.environment) != _origin(environment()):
        raise UserError(f"{path} was measured at another commit or on another machine: leave out --resume")
    return old


def _origin(where: dict[str, Any]) -> list[Any]:
    """What all records of one file have in common."""
    hardware = where.get("hardware") or {}
    versions = where.get("versions") or {}
    return [where.get("commit"), *(hardware.get(key) for key in ("cpu", "gpu", "threads")), versions.get("torch")]


Started = Callable[[int, int, Job], OnMessage]
"""Called with number, total and job before each worker; what it returns gets the worker's messages."""


def run(
    plan: Comparison,
    path: Path,
    started: Started,
    finished: Callable[[Record], None],
    *,
    resume: bool = False,
    timeout: float | None = None,
) -> Results:
    """Run all jobs. `path` is rewritten after each, so that an interrupted run leaves what it has measured."""
    old = earlier_results(plan, path) if resume else None
    results = Results(environment(), plan.config())
    todo = list(jobs(plan))
    began, earlier = time.monotonic(), (old and old.took_s) or 0.0
    for number, job in enumerate(todo, 1):
        known = old.find(job) if old else None
        if known is None or not known.ok:
            known = run_worker(job, started(number, len(todo), job), timeout)
        results.add(known)
        finished(known)
        results.took_s = earlier + time.monotonic() - began
        write_json(path, results.to_json())
    return results
