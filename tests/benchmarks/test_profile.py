"""`make stage3 profile`: on a tiny model, the parts add up to the steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.profile import HOST, LINEAR, profile
from benchmarks.record import Record
from benchmarks.worker import Job
from tests.benchmarks.conftest import run_bench


@pytest.mark.parametrize("stage", ["m0", "m2", "m4"])
def test_table_picture_and_trace(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = profile(stage, "mixed", "random:tiny-llama", "cpu", "float32", 5, True, {}, tmp_path)
    said = capsys.readouterr().out
    shares = [int(line.split()[-1].rstrip("%")) for line in said.splitlines() if line.rstrip().endswith("%")]
    assert len(shares) == 5 and 97 <= sum(shares) <= 103 and min(shares) >= 0
    assert LINEAR in said and HOST in said
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step", "linear layers", "attention", "sampling"} <= names
    assert picture.stat().st_size > 5000


def test_the_gpu_jobs_name_stages_that_exist_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def fake_worker(job: Job, *_: object) -> Record:
        ran.append(job.workload)
        return Record(job.stage, job.workload)

    monkeypatch.setattr("benchmarks.compare.run_worker", fake_worker)
    for parts in (gpu.bench_parts(), gpu.ladder_parts()):
        assert len({part.name for part in parts}) == len(parts)
        arguments = (parts, "random:tiny-llama", "float32", "cpu", tmp_path, True)
        results = list(gpu.run_parts(*arguments))
        assert all(record.ok for one in results for record in one.records) and ran
        ran.clear()
        assert len(list(gpu.run_parts(*arguments))) == len(parts)
        assert ran == []


def test_an_unknown_gpu_job_is_one_line() -> None:
    done = run_bench("gpu", "nonsense")
    assert done.returncode == 2 and "bench, ladder" in done.stderr
