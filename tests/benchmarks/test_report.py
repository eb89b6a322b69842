"""The report and the interview guide: what they say is what was measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Results
from benchmarks.report.claims import CLAIMS
from benchmarks.report.figures import evaluate
from benchmarks.report.fill import Filler, line_of
from benchmarks.report.reflow import reflow
from benchmarks.report.sources import REPORTS, Machine, read_machine, read_machines
from benchmarks.report.verdicts import MET, NOT_MEASURED, NOT_MET, judge
from benchmarks.report.write import TEMPLATES, guides, write_all
from common.errors import UserError

KEPT = REPORTS / "cpu" / "ladder.json"
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write a results file in which each named stage makes so many tokens a second on a workload."""

    def write(
        name: str, speeds: dict[str, float], workload: str = "mixed", machine: str = "cpu", **config: Any
    ) -> Path:
        values = json.loads(KEPT.read_text())
        pattern = values["records"][0]
        values["config"] |= {"workloads": ["mixed"], **config}
        values["records"] = [
            {**pattern, "stage": stage, "workload": "mixed", "output_tokens_per_s": speed}
            for stage, speed in speeds.items()
        ]
        path = tmp_path / machine / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
        return path

    return write


def read(folder: Path) -> Machine:
    machine = read_machine(folder)
    assert machine is not None
    return machine


def test_a_ratio_is_taken_from_one_run(put: Put, tmp_path: Path) -> None:
    put("a.json", {"m1": 1, "m3": 5, "m4": 7})
    put("b.json", {"m1": 10, "m2": 30})
    speed = "mixed.{}.output_tokens_per_s"
    machine = read(tmp_path / "cpu")
    assert evaluate(machine, f"{speed.format('m2')} / {speed.format('m1')}") == 3
    assert evaluate(machine, f"1 - {speed.format('m1')} / {speed.format('m2')}") == pytest.approx(2 / 3)
    assert evaluate(machine, f"{speed.format('last')} / {speed.format('m1')}") == 7
    assert evaluate(machine, speed.format("m7")) is None


def test_an_ablation_stands_in_for_the_defaults(put: Put, tmp_path: Path) -> None:
    put("a-eager.json", {"m1": 1, "m2": 1, "m3": 1}, options={"fused_kernels": False})
    put("b.json", {"m1": 10, "m2": 30})
    assert evaluate(read(tmp_path / "cpu"), "mixed.m1.output_tokens_per_s") == 10


@pytest.mark.parametrize("name", ["mixed", "mixed.m1", "mixed.m1.speed", "attention.triton", "quality.bf16"])
def test_a_name_that_cannot_exist_is_silently_missing(put: Put, tmp_path: Path, name: str) -> None:
    put("a.json", {"m1": 1})
    with pytest.raises(UserError, match=re.escape(name.split(".")[-1])):
        evaluate(read(tmp_path / "cpu"), name)


def test_quick_sizes_and_foreign_files_are_taken_for_measurements(put: Put, tmp_path: Path) -> None:
    put("a.json", {"m1": 1})
    put("quick.json", {"m1": 9}, quick=True)
    (tmp_path / "cpu" / "broken.json").write_text("{")
    (tmp_path / "cpu" / "other.json").write_text('{"x": 1}')
    machine = read(tmp_path / "cpu")
    assert [bench.path.name for bench in machine.benches] == ["a.json"]
    assert [reason.split(":")[0] for reason in machine.left_out] == ["broken.json", "other.json", "quick.json"]
    assert read_machine(tmp_path) is None


@pytest.mark.parametrize(("speed", "verdict"), [(30.0, MET), (99.0, MET), (29.0, NOT_MET)])
def test_a_verdict_is_not_that_of_the_figures(put: Put, tmp_path: Path, speed: float, verdict: str) -> None:
    put("a.json", {"m1": 10, "m2": speed})
    machine = read(tmp_path / "cpu")
    filler = Filler({"cpu": machine}, "cpu", tmp_path)
    found = judge(next(c for c in CLAIMS if c.said == "throughput 3–5×"), machine, filler)
    assert found.verdict == verdict
    assert found.value == f"{speed / 10:.1f}×"
    assert ("nobody" in found.why) == (verdict == NOT_MET)
    absent = judge(next(c for c in CLAIMS if c.stage == "m5"), machine, filler)
    assert (absent.verdict, absent.why) == (NOT_MEASURED, "`make bench WORKLOAD=interference`")


def test_a_claim_cannot_be_looked_up() -> None:
    machines = read_machines()
    for claim in CLAIMS:
        assert claim.low is not None or claim.high is not None
        for name, machine in machines.items():
            found = judge(claim, machine, Filler(machines, name, REPORTS))
            assert "{" not in found.why
            assert found.verdict != NOT_MET or found.why, f"{claim.said}: not met, and nothing says why"


def test_readers_are_told_figures_of_another_machine(put: Put, tmp_path: Path) -> None:
    put("a.json", {"m1": 10, "m2": 30})
    put("a.json", {"m1": 77}, machine="local")
    machines = read_machines(tmp_path)
    assert list(machines) == ["local", "cpu"]
    filler = Filler(machines, "local", tmp_path, "en", "cpu")
    text = (
        "{figure:mixed.m1.output_tokens_per_s} {figure:mixed.m2.output_tokens_per_s} {figure:h100:nano.m6.ttft_s.p50|s}"
    )
    assert filler.fill(text) == "77.0 30.0† *not measured yet: run `make gpu-bench`*"


def test_placeholders_that_point_nowhere_are_accepted(tmp_path: Path) -> None:
    filler = Filler({}, "cpu", REPORTS)
    assert filler.fill("{code:common/engine.py:Engine.step}").startswith("[`Engine.step`](../common/engine.py#L")
    for wrong in ("{code:common/engine.py:Engine.stop}", "{code:common/none.py:x}", "{link:none.md|text}"):
        with pytest.raises(UserError, match="placeholder"):
            filler.fill(wrong)
    lines = (REPORTS.parent / "common" / "engine.py").read_text().splitlines()
    line = lines[line_of("common/engine.py", "Engine.step") - 1]
    assert line.strip().startswith("def step(")


@pytest.mark.parametrize("name", ["interview_guide.md", "interview_guide.zh-CN.md"])
def test_a_question_has_no_answer(name: str) -> None:
    text = guides({n: m for n, m in read_machines().items() if n != "local"}, REPORTS)[name]
    assert "{" not in re.sub(r"`[^`]*`", "", text)
    parts = re.split(r"^### (Q\d+)", text, flags=re.M)
    assert parts[1::2] == [f"Q{number}" for number in range(1, 16)]
    assert all(len(answer) > 100 for answer in parts[2::2])
    questions = re.findall(r"^(\d+)\. \*\*[“\"]", text, flags=re.M)
    assert questions == [str(number) for number in range(1, 11)]
    assert len(re.findall(r"Correction[.:]\*\*|更正[。：]\*\*", text)) >= 14
    placeholders = [
        re.findall(r"\{(?:code|figure):[^|}]+", (TEMPLATES / n).read_text()) for n in (name, "interview_guide.md")
    ]
    assert set(placeholders[0]) == set(placeholders[1]), "the two languages do not say the same"


def test_the_page_needs_something_beside_itself(put: Put, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    shutil.copy(KEPT, tmp_path / "cpu" / "ladder.json")
    names = [path.name for path in write_all(tmp_path)]
    assert names == ["report.html", "report.md", "interview_guide.md", "interview_guide.zh-CN.md"]
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert any(source.startswith("data:image/png;base64,") for source in sources)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert {a[1:] for a in sources if a[0] == "#"} <= set(re.findall(r'id="([^"]*)"', page))
    assert "prefers-color-scheme: dark" in page
    speed = Results.read(KEPT).records[1].output_tokens_per_s
    assert speed is not None
    assert f"{speed:.0f} ±" in page
    text = (tmp_path / "report.md").read_text()
    assert f"{speed:.0f} ±" in text
    assert (tmp_path / "cpu" / "ladder-throughput.png").is_file()
    assert re.search(r"!\[[^\]]*\]\(cpu/ladder-throughput\.png\)", text)


def test_no_results_are_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make bench"):
        list(write_all(tmp_path))


def test_reflow_breaks_what_belongs_together() -> None:
    text = "1. " + "word " * 22 + "[`a b`](c d) ends.\n   more\n\n| a | b |\n# heading\n"
    again = reflow(text)
    assert "[`a b`](c d)" in again
    assert again.endswith("\n\n| a | b |\n# heading\n")
    assert all(len(line) <= 120 for line in again.splitlines())
    assert again.splitlines()[1].startswith("   ")
