"""`make stage3 profile`: on a tiny model, the parts add up to the steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.__main__ import app
from benchmarks.compare import Results, make_comparison
from benchmarks.files import write_json
from benchmarks.profile import profile
from benchmarks.profile_parts import (
    ATTENTION,
    ELEMENTWISE,
    HOST,
    IDLE,
    LINEAR,
    SAMPLING,
    STEP,
    learn_kernels,
    parts_on_cpu,
    parts_on_gpu,
)
from benchmarks.record import Record
from benchmarks.worker import Job


@pytest.mark.parametrize("stage", ["m0", "m2", "m4"])
def test_table_picture_and_trace(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture, numbers = profile(stage, "mixed", "random:tiny-llama", "cpu", "float32", 5, True, {}, tmp_path)
    said = capsys.readouterr().out
    shares = [int(line.split()[-1].rstrip("%")) for line in said.splitlines() if line.rstrip().endswith("%")]
    assert len(shares) == 5 and 97 <= sum(shares) <= 103 and min(shares) >= 0
    assert LINEAR in said and HOST in said
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step", "linear layers", "attention", "sampling"} <= names
    assert picture.stat().st_size > 5000
    kept = json.loads(numbers.read_text())
    assert {row["where"] for row in kept["records"]} >= {LINEAR, HOST} and kept["environment"]["hardware"]
    assert all(row["ms_per_step"] >= 0 for row in kept["records"])


def test_the_gpu_jobs_name_stages_that_exist_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def fake_worker(job: Job, *_: object) -> Record:
        ran.append(job.workload)
        return Record(job.stage, job.workload, plain=job.execution is not None)

    monkeypatch.setattr("benchmarks.compare.run_worker", fake_worker)
    for parts in (gpu.bench_parts(), gpu.ladder_parts()):
        assert len({part.name for part in parts}) == len(parts)
        arguments = (parts, "random:tiny-llama", "float32", "cpu", tmp_path, True)
        results = list(gpu.run_parts(*arguments))
        assert all(record.ok for one in results for record in one.records) and ran
        ran.clear()
        assert len(list(gpu.run_parts(*arguments))) == len(parts)
        assert ran == []


def test_each_part_runs_with_the_options_of_its_name() -> None:
    """Must not measure something else than its name says."""
    options = {part.name: part.rest.get("options", {}) for part in gpu.bench_parts()}
    assert options["gpu-bench"] == {}
    assert options["gpu-bench-head16"] == {"head_bits": 16}
    ways = {part.name: part.rest.get("execution") for part in gpu.bench_parts()}
    assert ways["gpu-bench"] is None and ways["gpu-bench-plain"] == "plain" and ways["gpu-bench-graphs"] == "graphs"
    assert [part.name for part in gpu.ladder_parts()] == ["gpu-ladder"]


def test_the_gpu_jobs_run_as_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_worker(job: Job, *_: object) -> Record:
        return Record(job.stage, job.workload, plain=job.execution is not None)

    monkeypatch.setattr("benchmarks.compare.run_worker", fake_worker)
    monkeypatch.setattr("benchmarks.__main__._show", lambda *_: None)  # there is nothing to draw
    for job in ("bench", "ladder"):
        arguments = ["gpu", job, "--model", "random:tiny-llama", "--device", "cpu", "--dtype", "fp32", "--quick"]
        done = CliRunner().invoke(app, [*arguments, "--out-dir", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert "all of it took" in done.output
    assert (tmp_path / "gpu-limits.json").exists()


def test_each_workload_is_compared_with_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each workload's line names the first stage's speed and its share of its limit. Must not take another limit."""
    plan = make_comparison(["m6", "m7"], ["nano"], peers=False, model="random:tiny-llama", dtype="fp32", device="cpu")
    results = Results({}, plan.config())
    results.add(Record("m6", "nano", output_tokens_per_s=300.0))
    results.add(Record("m7", "nano", output_tokens_per_s=900.0))
    write_json(tmp_path / "gpu-bench.json", results.to_json())
    monkeypatch.setattr("benchmarks.limits.measure", lambda *_: {"nano": 400.0})
    lines = list(gpu.limits("random:tiny-llama", "fp32", "cpu", tmp_path, True))
    assert lines == ["m6 · nano: 300 tokens/s; reading at the rate of a copy: 400 (75%)"]


def test_an_outer_range_counts_for_what_its_inner_ones_leave() -> None:
    def around(name: str, start: int, length: int, thread: int = 1) -> dict[str, object]:
        return {"cat": "user_annotation", "name": name, "ts": start, "dur": length, "tid": thread}

    events = [
        around(LINEAR, 20, 30),
        around(STEP, 0, 100),
        around(ELEMENTWISE, 10, 60),
        around(ELEMENTWISE, 25, 5),
        around("somebody else's", 10, 60),
        around(ATTENTION, 70, 10),
        around(STEP, 100, 50),
        around(SAMPLING, 0, 40, thread=2),
    ]
    parts = {name: round(seconds * 1e6) for name, seconds in parts_on_cpu(events).items()}
    assert parts == {LINEAR: 25, ELEMENTWISE: 35, ATTENTION: 10, SAMPLING: 40, HOST: 80}


def test_kernels_are_known_by_where_they_were_launched_and_then_by_name() -> None:
    def event(cat: str, name: str, start: int, length: int, number: int = 0) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": start, "dur": length, "tid": 1, "args": {"correlation": number}}

    learnt = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", LINEAR, 10, 20),
        event("cuda_driver", "cuLaunchKernelEx", 12, 1, 7),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, 8),
        event("cuda_runtime", "cudaLaunchKernel", 40, 1, 9),  # in the step, in none of its parts
        event("user_annotation", ATTENTION, 50, 20),
        event("cuda_runtime", "cudaLaunchKernel", 55, 1, 10),
        event("kernel", "gemm_64x8", 200, 30, 7),
        event("kernel", "shared", 230, 5, 8),
        event("kernel", "index", 240, 5, 9),
        event("kernel", "shared", 250, 9, 10),
        event("gpu_user_annotation", ATTENTION, 250, 9, 10),
    ]
    known = learn_kernels(learnt)
    assert known == {"gemm_64x8": LINEAR, "gemm_": LINEAR, "shared": ATTENTION, "index": HOST}
    measured = [
        event("kernel", "gemm_64x8", 0, 10),
        event("kernel", "gemm_128x8", 10, 10),  # another tile of the same kernel
        event("kernel", "shared", 15, 10),  # while that one runs, until 20: waits, and nothing is idle
        event("gpu_user_annotation", STEP, 0, 60),
        event("kernel", "never seen", 30, 2),
        event("gpu_memcpy", "Memcpy DtoH", 40, 3),
    ]
    parts = {name: round(seconds * 1e6) for name, seconds in parts_on_gpu(measured, known).items()}
    assert parts == {LINEAR: 20, ATTENTION: 5, ELEMENTWISE: 0, SAMPLING: 0, HOST: 5, IDLE: 13}
    assert sum(parts.values()) == 43  # the time that passed
