"""`make stage3 profile`: on a tiny model, parts and operators add up to the steps, in each phase."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import pytest
from rich.console import Console
from torch.profiler import record_function
from typer.testing import CliRunner

import stages
from benchmarks import gpu
from benchmarks.__main__ import app
from benchmarks.compare import Results, make_comparison
from benchmarks.files import write_json
from benchmarks.profile import mark, profile, run_steps
from benchmarks.profile_parts import (
    ATTENTION,
    ELEMENTWISE,
    HOST,
    IDLE,
    LINEAR,
    SAMPLING,
    STEP,
    Parts,
    Phases,
    Profile,
    Work,
    learn_kernels,
    parts_on_cpu,
    parts_on_gpu,
)
from benchmarks.profile_ranges import named_parts, phase
from benchmarks.recipes import BenchRequest
from benchmarks.record import Record
from benchmarks.worker import Job
from common import SamplingParams
from common.errors import UserError
from common.execution.cpu import cpu_elementwise
from common.plan import StepPlan


@pytest.mark.parametrize("stage", ["m0", "m2", "m4"])
def test_tables_picture_and_trace(stage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The parts add up, in each phase; the operators add up to the same. Must not leave a range in the engine."""
    trace, picture, numbers = profile(stage, "mixed", "random:tiny-llama", "cpu", "float32", 7, True, [], tmp_path)
    said, complaints = capfd.readouterr()
    assert "USDT" not in complaints, "PyTorch's profiler says when it starts and stops"
    assert "elementwise: norms, rotary, SwiGLU." in said
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step", "linear layers", "attention", "sampling", "plan", "wait", "update"} <= names
    assert picture.stat().st_size > 5000
    kept = json.loads(numbers.read_text())
    later = "recompute" if stage == "m0" else "decode"
    steps = {row["phase"]: row["steps"] for row in kept["records"]}
    assert steps["prefill"] + steps[later] == 7 and min(steps.values()) > 0
    assert f"{steps[later]} {later} step" in said
    assert kept["environment"]["hardware"]
    for each in ("prefill", later):
        parts = [row for row in kept["records"] if row["phase"] == each]
        work = [row for row in kept["work"] if row["phase"] == each]
        assert {row["where"] for row in parts} >= {LINEAR, HOST} and all(row["ms_per_step"] >= 0 for row in parts)
        took = sum(row["ms_per_step"] for row in parts)
        assert sum(row["us_per_step"] for row in work) == pytest.approx(took * 1e3)
        assert {"aten::mm", "Python, outside of operators"} <= {row["name"] for row in work}
    compiled = {row["name"]: row["where"] for row in kept["work"] if row["name"].startswith("numba")}
    assert bool(compiled) == (stage == "m4")
    assert compiled.get("numba: decode", ATTENTION) == ATTENTION
    assert type(cpu_elementwise.norm).__module__.startswith("numba")


def test_an_option_of_a_later_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="m3 has no option 'prefix_index': it arrives with m6"):
        profile("m3", "mixed", "random:tiny-llama", "cpu", "float32", 1, True, ["prefix_index=radix"], tmp_path)
    assert list(tmp_path.iterdir()) == []


class Chunk(NamedTuple):
    kind: str


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (["decode", "decode", "idle"], "decode"),
        (["prefill", "prefill"], "prefill"),
        (["prefill", "recompute"], "prefill"),
        (["recompute"], "recompute"),
        (["decode", "prefill"], "mixed"),
        (["decode", "recompute"], "mixed"),
    ],
)
def test_a_step_is_named_by_what_it_computes(kinds: list[str], name: str) -> None:
    assert phase(cast(StepPlan, SimpleNamespace(chunks=[Chunk(kind) for kind in kinds]))) == name


def test_ranges_lie_in_their_step_and_end_with_it() -> None:
    """Of what NVTX gets: each step with its phase and tokens, and in it its parts. Must not change a token."""
    opened: list[str] = []
    depth = 0

    @contextmanager
    def around(name: str) -> Generator[None]:
        nonlocal depth
        opened.append("  " * depth + name)
        depth += 1
        yield
        depth -= 1

    with stages.build("m5", model="random:tiny-llama", dtype="float32", device="cpu") as engine:
        plain = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].token_ids
        before = {id(part): dict(vars(part)) for part in (engine.runner, engine.scheduler, engine.runner.attention)}
        with named_parts(engine, around):
            assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].token_ids == plain
        for part in (engine.runner, engine.scheduler, engine.runner.attention):
            assert vars(part).keys() == before[id(part)].keys()
    assert [name for name in opened if name.startswith("step")] == [
        "step 1 prefill 3", "step 2 decode 1", "step 3 decode 1"
    ]  # fmt: skip
    assert {"plan", "wait", "update", f"  {ELEMENTWISE}", "  sampling"} <= set(opened) and depth == 0
    assert any(name.endswith(ATTENTION) and name.startswith("    ") for name in opened)


def test_nvtx_ranges_are_between_the_calls_of_cudas_profiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    @contextmanager
    def around(name: str) -> Generator[None]:
        said.append(name)
        yield

    monkeypatch.setattr("torch.cuda.nvtx.range", around)
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: said.append("start"))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: said.append("stop"))
    with stages.build("m4", model="random:tiny-llama", dtype="float32", device="cpu") as engine:
        mark(engine, [BenchRequest([1, 2, 3], 8)], 2)
    assert said[:2] == ["start", "step"] and said[-1] == "stop"
    assert said.count("step") == 2 and {"step 1 prefill 3", "step 2 decode 1", ATTENTION} <= set(said)
    assert "--capture-range=cudaProfilerApi" in capsys.readouterr().out


def test_nvtx_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for a GPU: choose --device cuda"):
        profile("m4", "mixed", "random:tiny-llama", "cpu", "float32", 2, True, [], tmp_path, nvtx=True)


def test_the_gpu_jobs_name_stages_that_exist_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def fake_worker(job: Job, *_: object) -> Record:
        ran.append(job.workload)
        return Record(job.stage, job.workload, plain=job.execution is not None)

    monkeypatch.setattr("benchmarks.compare.run_worker", fake_worker)
    for parts in gpu.JOBS.values():
        assert len({part.name for part in parts}) == len(parts)
        arguments = (parts, "random:tiny-llama", "float32", "cpu", tmp_path, True)
        results = list(gpu.run_parts(*arguments))
        assert all(record.ok for one in results for record in one.records) and ran
        ran.clear()
        assert len(list(gpu.run_parts(*arguments))) == len(parts)
        assert ran == []


def test_each_part_runs_with_the_options_of_its_name() -> None:
    """Must not measure something else than its name says."""
    options = {part.name: part.rest.get("options", {}) for part in gpu.JOBS["bench"]}
    assert options["gpu-bench"] == {}
    assert options["gpu-bench-head16"] == {"head_bits": 16}
    ways = {part.name: part.rest.get("execution") for part in gpu.JOBS["bench"]}
    assert ways["gpu-bench"] is None and ways["gpu-bench-plain"] == "plain" and ways["gpu-bench-graphs"] == "graphs"
    assert [part.name for part in gpu.JOBS["ladder"]] == ["gpu-ladder"]


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


def event(cat: str, name: str, start: int, length: int, number: int = 0, thread: int = 1) -> dict[str, object]:
    args = {"correlation": number}
    return {"cat": cat, "name": name, "ts": start, "dur": length, "tid": thread, "args": args}


def around(name: str, start: int, length: int, thread: int = 1) -> dict[str, object]:
    return event("user_annotation", name, start, length, thread=thread)


def microseconds(parts: Parts) -> dict[str, dict[str, int]]:
    return {phase: {name: round(time * 1e6) for name, time in spent.items()} for phase, spent in parts.items()}


CPU_EVENTS = [
    around(LINEAR, 20, 30),
    around(STEP, 0, 100),
    around("step 1 prefill 7", 5, 90),
    around(ELEMENTWISE, 10, 60),
    around(ELEMENTWISE, 25, 5),
    around("of somebody else", 10, 60),
    around(ATTENTION, 70, 10),
    around(STEP, 100, 50),
    around("step 2 decode 1", 110, 30),
    around(SAMPLING, 0, 40, thread=2),
    event("cpu_op", "aten::linear", 20, 20),
    event("cpu_op", "aten::mm", 22, 15),
    event("cpu_op", "aten::mm", 40, 3),
    around("numba: decode", 72, 6),
    event("cpu_op", "aten::mm", 112, 4),
]


def test_an_outer_range_counts_for_what_its_inner_ones_leave() -> None:
    assert microseconds(parts_on_cpu(CPU_EVENTS)[0]) == {
        "prefill": {LINEAR: 25, ELEMENTWISE: 35, ATTENTION: 10, SAMPLING: 40, HOST: 30},
        "decode": {LINEAR: 0, ELEMENTWISE: 0, ATTENTION: 0, SAMPLING: 0, HOST: 50},
    }
    assert Phases(CPU_EVENTS).counts == {"prefill": 1, "decode": 1}


def test_an_operator_counts_without_what_it_calls() -> None:
    _, works = parts_on_cpu(CPU_EVENTS)
    got = {
        phase: [(w.name, w.part, w.calls, round(w.seconds * 1e6)) for w in works[phase]] for phase in works
    }  # the longest first
    rest = "Python, outside of operators"
    assert got == {
        "prefill": [
            (rest, "", 1, 140 - 29), ("aten::mm", LINEAR, 2, 18), ("numba: decode", ATTENTION, 1, 6),
            ("aten::linear", LINEAR, 1, 5),
        ],
        "decode": [(rest, "", 1, 46), ("aten::mm", HOST, 1, 4)],
    }  # fmt: skip


def test_kernels_are_known_by_where_they_were_launched_and_then_by_name() -> None:
    learnt = [
        around(STEP, 0, 100),
        around(LINEAR, 10, 20),
        event("cuda_driver", "cuLaunchKernelEx", 12, 1, 7),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, 8),
        event("cuda_runtime", "cudaLaunchKernel", 40, 1, 9),  # in the step, in none of its parts
        around(ATTENTION, 50, 20),
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
        around(STEP, 0, 9),
        around("step 1 prefill 7", 1, 5),
        event("cuda_runtime", "cudaLaunchKernel", 2, 1, 1),
        around("step 2 decode 1", 6, 2),  # planned and started ahead, in the same step of the engine
        event("cuda_runtime", "cudaGraphLaunch", 7, 1, 2),
        event("kernel", "gemm_64x8", 0, 10, 1),
        event("kernel", "gemm_128x8", 10, 10, 1),  # another tile of the same kernel
        event("kernel", "shared", 15, 10, 99),  # while that one runs, until 20: waits, and nothing is idle
        event("gpu_user_annotation", STEP, 0, 60),
        event("kernel", "never seen", 30, 2, 2),
        event("kernel", "shared", 33, 2, 2),  # of the same graph
        event("gpu_memcpy", "Memcpy DtoH", 40, 3, 98),  # its launch is not known: as the one before
    ]
    times, works = parts_on_gpu(measured, known)
    parts = microseconds(times)
    assert parts == {
        "prefill": {LINEAR: 20, ATTENTION: 5, ELEMENTWISE: 0, SAMPLING: 0, HOST: 0, IDLE: 0},
        "decode": {LINEAR: 0, ATTENTION: 2, ELEMENTWISE: 0, SAMPLING: 0, HOST: 5, IDLE: 11},
    }
    assert sum(sum(spent.values()) for spent in parts.values()) == 43  # the time that passed
    assert [(w.name, w.calls, round(w.seconds * 1e6)) for w in works["decode"]] == [
        ("Memcpy DtoH", 1, 3), ("never seen", 1, 2), ("shared", 1, 2)
    ]  # fmt: skip
    assert {w.name: w.part for w in works["prefill"]} == {
        "gemm_64x8": LINEAR,
        "gemm_128x8": LINEAR,
        "shared": ATTENTION,
    }


def test_the_table_shows_the_longest_kernels_and_adds_up_the_others() -> None:
    works = [Work(f"void at::native::kernel_{i}", LINEAR, calls=4, seconds=(20 - i) * 1e-6) for i in range(15)]
    found = Profile("heading", {"decode": 2}, {"decode": {LINEAR: 3e-3, IDLE: 1e-3}}, {"decode": works})
    with (console := Console(width=110)).capture() as captured:
        console.print(*found.tables())
    said = captured.get()
    assert "2 decode steps, 100% of the time" in said and "75%" in said
    rows = [line.split() for line in said.splitlines() if "kernel_" in line or " more " in line]
    assert rows[0] == ["kernel_0", "2.0", "10", "10%", *LINEAR.split()] and len(rows) == 13
    assert rows[-1] == ["3", "more", "6.0", "10", "11%"]
    kept = found.work_rows("decode")
    assert kept[0]["name"] == "void at::native::kernel_0" and sum(row["share"] for row in kept) == pytest.approx(1)


def test_steps_go_on_until_some_are_not_prefill_alone() -> None:
    """Must not show twenty prefill steps of a stage that computes all prompts first, and no decode."""
    engine = stages.build("m2", model="random:tiny-llama", device="cpu", dtype="float32", max_model_len=64)
    requests = [BenchRequest([1 + i] * 40, 20) for i in range(8)]
    with engine, named_parts(engine) as seen:
        run_steps(engine, requests, 4, record_function, seen)
    assert seen["prefill"] >= 1 and seen["decode"] >= 2


def test_operations_that_fuse_still_find_attention() -> None:
    """Must not take another path because attention's methods are wrapped: fused operations read the owner of one."""
    with stages.build("m6", model="random:tiny-llama", device="cpu", dtype="float32", max_model_len=64) as engine:
        attention = engine.runner.attention
        with named_parts(engine):
            assert vars(attention)["attend"].__self__ is attention
