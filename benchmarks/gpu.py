"""The two jobs for a GPU: `make gpu-bench`, what execution gains, and `make gpu-ladder`, all stages. And one for any
device: `make interview`, the figures that the pages for interviews say aloud.

Each is a list of comparisons (jobs.toml), one results file each, which go on where an interrupted run stopped.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare import Results, in_rounds, make_comparison, run
from benchmarks.files import check_writable
from benchmarks.screen import Screen
from common.errors import UserError


@dataclass(frozen=True)
class Part:
    """One comparison: its name is that of its results file. stages: all, where none is named. rest: further arguments
    of `make_comparison`."""

    name: str
    workloads: list[str]
    stages: list[str] = field(default_factory=list[str])
    rest: dict[str, Any] = field(default_factory=dict[str, Any])


_ALL: dict[str, list[dict[str, Any]]] = tomllib.loads(Path(__file__).with_name("jobs.toml").read_text(encoding="utf-8"))
JOBS = {job: [Part(**part) for part in parts] for job, parts in _ALL.items()}
TABLE = JOBS["bench"][0]


def limits(model: str, dtype: str, device: str, folder: Path, quick: bool) -> Iterator[str]:
    """What the unquantised engine of the table would make at the rate of a copy measured now, and what it makes."""
    from benchmarks.limits import measure

    most = measure(folder / "gpu-limits.json", TABLE.workloads, model, dtype, device, quick)
    for record in Results.read(folder / f"{TABLE.name}.json").records:
        if record.stage == TABLE.stages[0] and record.output_tokens_per_s:
            limit, got = most[record.workload], record.output_tokens_per_s
            at_most = f"reading at the rate of a copy: {limit:,.0f} ({got / limit:.0%})"
            yield f"{record.stage} · {record.workload}: {got:,.0f} tokens/s; {at_most}"


def run_parts(parts: list[Part], model: str, dtype: str, device: str, folder: Path, quick: bool) -> Iterator[Results]:
    """Each part's results, as soon as it is done. What its file holds already is kept."""
    for part in parts:
        path = folder / f"{part.name}.json"
        check_writable(path)
        given: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "quick": quick, **part.rest}
        plan = make_comparison(part.stages, part.workloads, peers=False, **given)
        print(f"{part.name}: {sum(1 for _ in in_rounds(plan))} runs, {path}", flush=True)
        with Screen() as screen:
            try:
                yield run(plan, path, screen.started, screen.result, resume=True)
            except UserError as error:
                raise UserError(f"{error}; or move {path} away") from error
