"""Execution is an axis of its own: rows, options and pictures that never credit an idea with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.compare import Results, jobs, make_comparison
from benchmarks.execution import WAYS, execution_of, options_of
from benchmarks.plots.latency import latency
from benchmarks.plots.throughput import throughput
from benchmarks.record import Record
from benchmarks.report.figures import evaluate
from benchmarks.report.sources import read_machines
from benchmarks.table import render
from common.errors import UserError
from tests.benchmarks.conftest import bench_here

TINY: dict[str, Any] = {"peers": False, "model": "random:tiny-llama", "dtype": "fp32", "device": "cpu", "quick": True}
HARDWARE = {"cpu": "A CPU", "gpu": "A GPU", "cpu_cores": 2, "threads": 2, "memory_bytes": 2**34, "gpu_memory_bytes": 1}
SUMMARY = dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 1.0)


def rows(stages: str, workload: str, **changed: Any) -> list[tuple[str, bool, dict[str, Any]]]:
    plan = make_comparison(stages.split(), [workload], **{**TINY, **changed})
    return [(job.stage, job.execution == "plain", job.options) for job in jobs(plan)]


def made(speeds: dict[str, tuple[float | None, float]]) -> Results:
    """Results of `mixed`: for each stage tokens per second, the idea alone (or None) and as by default."""
    config = {"workloads": ["mixed"], "device": "cuda", "model": "m", "dtype": "bf16", "quick": False, "options": {}}
    results = Results({"hardware": HARDWARE, "commit": None}, config)
    for stage, both in speeds.items():
        for speed, plain in zip(both, (True, False), strict=True):
            if speed is not None:
                times = {name: {**SUMMARY, "p50": 1 / speed} for name in ("ttft_s", "itl_s", "e2e_s")}
                rates = {"output_tokens_per_s": speed, "output_tokens_per_s_repeats": [speed]}
                results.add(Record(stage, "mixed", plain=plain, **rates, **times))
    return results


def test_a_ladder_has_a_row_for_the_idea_alone_where_execution_differs() -> None:
    assert [row[:2] for row in rows("m0 m3 m4 m7", "mixed")] == [
        ("m0", False), ("m3", False), ("m4", True), ("m4", False), ("m7", True), ("m7", False),
    ]  # fmt: skip
    assert [bool(execution_of(stage, "cuda")) for stage in ("m1", "m2", "m4")] == [False, True, True]
    assert not any(execution_of(stage, "cpu") for stage in ("m0", "m1", "m2", "m3"))


def test_other_workloads_and_a_chosen_execution_have_one_row() -> None:
    assert [row[:2] for row in rows("m4", "single")] == [("m4", False)]
    assert rows("m4", "mixed", options={"fused_kernels": False}) == [("m4", False, {"fused_kernels": False})]
    assert rows("m3 m4", "mixed", execution="plain") == [
        ("m3", False, {"overlap": False}), ("m4", False, WAYS["plain"]),
    ]  # fmt: skip
    assert rows("m1 m4", "mixed", execution="graphs")[0] == ("m1", False, {})


def test_the_plain_row_runs_without_all_of_execution_and_the_other_with_the_defaults() -> None:
    assert [row[2] for row in rows("m6", "ladder")] == [WAYS["plain"], {}]


def test_a_way_that_does_not_exist_is_refused_at_the_door() -> None:
    with pytest.raises(UserError, match=r"unknown execution 'plan'\. Did you mean 'plain'"):
        options_of("plan", "m4")
    with pytest.raises(UserError, match="unknown execution"):
        make_comparison(["m1"], ["single"], **TINY, execution="quick")


def test_an_option_that_a_stage_lacks_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="m5 has no option 'prefix_index': it arrives with m6"):
        make_comparison(["m5", "m6"], ["single"], **TINY, options={"prefix_index": "radix"})


def test_factors_of_ideas_are_over_ideas_and_those_of_execution_over_the_row_above() -> None:
    screen = io.StringIO()
    Console(file=screen, width=120).print(render(made({"m3": (None, 100), "m4": (130, 1000), "m5": (169, 845)})))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    found = {tuple(line[: 2 if line[0] == "+" else 1]): line for line in lines if line and line[0] in ("m4", "m5")}
    assert found["m4",][1:3] == ["130", "1.30"] and found["m5",][1:3] == ["169", "1.30"]
    assert [line[2:4] for line in lines if line[:2] == ["+", "execution"]] == [["1,000", "7.69"], ["845", "5.00"]]


def test_the_picture_hatches_what_execution_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, object]] = []
    barh = Axes.barh

    def spy(self: Axes, y: Any, width: Any, **how: Any) -> Any:
        drawn.append((how.get("left", 0), width, how.get("hatch")))
        return barh(self, y, width, **how)

    monkeypatch.setattr(Axes, "barh", spy)
    figure = throughput(made({"m3": (None, 100), "m4": (130, 1000)}), "mixed")
    assert figure is not None and (130, 870, "////") in drawn
    assert figure.get_suptitle().replace("\u00a0", " ").replace("\n", " ") == (
        "m4 flash attention generates 1.30 times as many tokens per second as m3 paged KV; with execution 10 times"
    )
    figure = latency(made({"m3": (None, 100), "m4": (130, 1000)}), "mixed")
    assert figure is not None and [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "m3 paged KV", "m4 flash attention", "+ execution",
    ]  # fmt: skip
    assert "execution" in figure.get_suptitle()


def test_plain_rows_survive_the_file_and_have_figures(tmp_path: Path) -> None:
    results = made({"m3": (None, 100), "m4": (130, 1000)})
    folder = tmp_path / "gpu"
    folder.mkdir()
    from benchmarks.files import write_json

    write_json(folder / "bench.json", results.to_json())
    assert Results.read(folder / "bench.json") == results
    machine = read_machines(tmp_path)["gpu"]
    assert evaluate(machine, "mixed.m4.plain.output_tokens_per_s / mixed.m3.output_tokens_per_s") == 1.3
    assert evaluate(machine, "mixed.m3.plain.output_tokens_per_s") is None


def test_both_rows_are_run_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = ["compare", "--stages", "m4", "--workload", "ladder", "--repeats", "1", "--quick", "--device", "cpu"]
    done = bench_here(*words, "--model", "random:tiny-llama", "--dtype", "fp32", "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = Results.read(path)
    assert [(r.stage, r.plain) for r in results.plain + results.records] == [("m4", True), ("m4", False)]
    assert "+ execution" in done.stdout and "m4 · ladder · plain" in done.stderr
