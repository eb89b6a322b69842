"""The comparison: every contestant on every workload, each in a fresh process, written down as results come."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import stages
from benchmarks.environment import environment
from benchmarks.execution import PLAIN, execution_of, options_of
from benchmarks.files import read_json, write_json
from benchmarks.peers import PEERS
from benchmarks.process import OnMessage, run_worker
from benchmarks.record import SCHEMA, Record
from benchmarks.worker import Job
from benchmarks.workloads import Workload, find, preset_of
from common.config import parse_device
from common.errors import UserError, require
from common.models.load import open_source

LAST_STAGE = stages.short_name(stages.names()[-1])
M0_NOTE = "m0 ran `{}` instead: `{}` would take it too long"


@dataclass
class Comparison:
    """What to compare. `contestants`: short stage names and peers' names, in the order of the table. `execution`: the
    one way to run the stages (see `benchmarks.execution`); None: as by default, and plain too where it differs.
    `rounds`: how often the contestants of a workload take turns, each time in a fresh process."""

    contestants: list[str]
    workloads: list[str]
    model: str
    dtype: str
    device: str
    quick: bool = False
    sweep: bool = False
    repeats: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    execution: str | None = None
    rounds: int = 1

    @property
    def preset(self) -> str:
        return preset_of(self.device, self.quick)

    def config(self) -> dict[str, Any]:
        return {**vars(self), "preset": self.preset}


def contestants(names: Sequence[str], peers: bool) -> list[str]:
    """Short names of stages and peers, in order, each once; no names: all stages. `llama.cpp`: all of its formats."""
    named = [peer for peer in PEERS if peers or {peer, peer.split()[0]} & set(names)]
    chosen = {stages.short_name(n) for n in names or stages.names() if not any(n in (p, p.split()[0]) for p in named)}
    return sorted(chosen) + named


def make_comparison(
    names: Sequence[str], workloads: Sequence[str], *, peers: bool, model: str, dtype: str, device: str,
    options: Mapping[str, Any] | None = None, **rest: Any,
) -> Comparison:  # fmt: skip
    """Checks names, options and the model (without reading its weights) before anything runs: `UserError`."""
    require(bool(workloads), "no workload was named: leave out --workload, or see `python -m benchmarks workloads`")
    for workload in workloads:
        find(workload)
    chosen = contestants(names, peers)
    place = parse_device(device)
    options = dict(options or {})
    for name in ("model", "dtype", "device"):
        require(name not in options, f"--engine cannot set {name}, which peers need too: use --{name}")
    plan = Comparison(chosen, list(dict.fromkeys(workloads)), model, dtype, str(place), options=options, **rest)
    given = {"model": model, "dtype": dtype, "device": place}
    for stage in [stage for stage in plan.contestants if stage not in PEERS] or [LAST_STAGE]:
        stages.config_for(stage, {**given, **options_of(plan.execution, stage), **options})
    open_source(model, place)
    return plan


def jobs(plan: Comparison) -> Iterator[Job]:
    """One for each (contestant, workload), headlines first, then the points of the sweeps. On a ladder of stages, a
    stage that by default executes its plans in another way than plain runs plain first."""
    seen: set[tuple[str, str]] = set()
    for name in plan.workloads:
        for stage in plan.contestants:
            instead = find(name).m0_runs if stage == "m0" else ""
            workload, note = find(instead or name), M0_NOTE.format(instead, name) if instead else None
            if (stage, workload.name) not in seen:
                seen.add((stage, workload.name))
                if workload.ladder and plan.execution is None and _has_plain_row(plan, stage):
                    yield _job(plan, stage, workload, None, note, PLAIN)
                yield _job(plan, stage, workload, None, note)
    for name in plan.workloads if plan.sweep else ():
        workload = find(name)
        for number, variant in enumerate(workload.variants_for(plan.preset)):
            for stage in plan.contestants:
                limit = workload.m0_variants if stage == "m0" else None
                left_out = workload.stages_only if stage in PEERS else stages.number(stage) < workload.variants_from
                if not left_out and (limit is None or number < limit):
                    yield _job(plan, stage, workload, variant, None)


def _has_plain_row(plan: Comparison, stage: str) -> bool:
    """Not for peers, nor where an option decides how plans are executed."""
    chosen = plan.options.keys() & options_of(PLAIN, LAST_STAGE).keys()
    return stage not in PEERS and not chosen and bool(execution_of(stage, plan.device))


def _job(
    plan: Comparison, stage: str, workload: Workload, variant: str | None, note: str | None, way: str | None = None
) -> Job:
    repeats = plan.repeats or (1 if stage == "m0" else workload.repeats)
    execution = {} if stage in PEERS else options_of(way or plan.execution, stage)
    model, dtype, device, options = plan.model, plan.dtype, plan.device, {**execution, **plan.options}
    return Job(stage, workload.name, plan.preset, model, dtype, device, repeats, variant, note, options, way)


def in_rounds(plan: Comparison) -> Iterator[Job]:
    """A virtual machine's CPUs are moved between cores that share a cache or do not, some seconds each: contestants are
    comparable if each has met all of that."""
    for _, same in groupby(jobs(plan), key=lambda job: job.workload):
        yield from list(same) * plan.rounds


def median_round(records: Sequence[Record]) -> Record:
    """Of one contestant's rounds, with the speeds of all; of those that failed the last."""
    done = sorted((r for r in records if r.ok), key=lambda record: record.output_tokens_per_s or 0.0)
    if not done:
        return records[-1]
    speeds = [speed for record in records for speed in record.output_tokens_per_s_repeats or ()]
    repeats = sum(record.repeats for record in done)
    return replace(done[len(done) // 2], repeats=repeats, output_tokens_per_s_repeats=speeds)


RECORDS = ("records", "sweeps", "plain")


@dataclass
class Results:
    """The contents of bench.json. plain: of stages that `records` has with execution, the idea alone."""

    environment: dict[str, Any]
    config: dict[str, Any]
    records: list[Record] = field(default_factory=list[Record])
    sweeps: list[Record] = field(default_factory=list[Record])
    took_s: float | None = None  # all jobs, loading and warming up included; None in older files
    plain: list[Record] = field(default_factory=list[Record])

    def add(self, record: Record) -> None:
        """In the place of what it has of the same job."""
        there = self.sweeps if record.variant else self.plain if record.plain else self.records
        same = [(r.stage, r.workload, r.variant) == (record.stage, record.workload, record.variant) for r in there]
        at = same.index(True) if any(same) else len(there)
        there[at : at + 1] = [record]

    def find(self, job: Job) -> Record | None:
        there = self.sweeps if job.variant else self.plain if job.execution else self.records
        wanted = (job.stage, job.workload, job.variant)
        return next((r for r in there if (r.stage, r.workload, r.variant) == wanted), None)

    def plain_of(self, record: Record) -> Record | None:
        """The same stage on the same workload, the idea alone; None where it has no such row."""
        there = (r for r in self.plain if (r.stage, r.workload) == (record.stage, record.workload) and r.ok)
        return next(there, None) if record.ok and not record.variant else None

    def to_json(self) -> dict[str, Any]:
        records = {key: [record.to_json() for record in getattr(self, key)] for key in RECORDS}
        return {"schema": SCHEMA, **vars(self), **records}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        value = read_json(path)
        try:
            records = {key: [Record(**record) for record in value.get(key, [])] for key in RECORDS}
            where, config = value["environment"], value["config"]
            if not isinstance(where, dict) or not isinstance(config, dict):
                raise TypeError("environment and config are objects")
            return cls(where, config, took_s=value.get("took_s"), **records)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} was written by another version of the bench ({error}): run it again") from error


RESUME_NEEDS = ("model", "dtype", "device", "quick", "repeats", "options", "execution")


def earlier_results(plan: Comparison, path: Path) -> Results | None:
    """What an interrupted run of the same comparison has left; `UserError` if it was another comparison."""
    if not path.exists():
        return None
    old = Results.read(path)
    changed = [key for key in RESUME_NEEDS if old.config.get(key) != plan.config()[key]]
    require(not changed, f"{path} was measured with other values of {', '.join(changed)}: leave out --resume")
    same = _origin(old.environment) == _origin(environment())
    require(same, f"{path} was measured at another commit or on another machine: leave out --resume")
    return old


def _origin(where: dict[str, Any]) -> list[Any]:
    """What all records of one file have in common."""
    hardware = where.get("hardware") or {}
    versions = where.get("versions") or {}
    return [where.get("commit"), *(hardware.get(key) for key in ("cpu", "gpu", "threads")), versions.get("torch")]


Started = Callable[[int, int, Job], OnMessage]
"""Called with number, total and job before each worker; what it returns gets the worker's messages."""


def run(
    plan: Comparison, path: Path, started: Started, finished: Callable[[Record], None], *,
    resume: bool = False, timeout: float | None = None,
) -> Results:  # fmt: skip
    """Run all jobs. `path` is rewritten after each, so that an interrupted run leaves what it has measured."""
    old = earlier_results(plan, path) if resume else None
    results = Results(environment(), plan.config())
    todo, ran = list(in_rounds(plan)), dict[tuple[Any, ...], list[Record]]()
    began, earlier = time.monotonic(), (old and old.took_s) or 0.0
    for number, job in enumerate(todo, 1):
        known = old.find(job) if old else None
        if known is None or not known.ok:
            known = run_worker(job, started(number, len(todo), job), timeout)
            before = ran.setdefault((job.stage, job.workload, job.variant, job.execution), [])
            before.append(known)
            known = median_round(before)
        results.add(known)
        finished(known)
        results.took_s = earlier + time.monotonic() - began
        write_json(path, results.to_json())
    return results
