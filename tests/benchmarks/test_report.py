"""The report and the interview guide: what they say is what was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Results
from benchmarks.execution import WAYS
from benchmarks.report.blocks import to_markdown
from benchmarks.report.claims import CLAIMS, MET, NOT_MEASURED, NOT_MET, judge
from benchmarks.report.content import _peers as peer_rows
from benchmarks.report.cpu_speed import REACH, cpu_blocks, reached
from benchmarks.report.execution import execution_blocks, peer_blocks
from benchmarks.report.figures import evaluate
from benchmarks.report.fill import Filler, line_of
from benchmarks.report.peers import MODEL
from benchmarks.report.sheets import sheet_blocks
from benchmarks.report.sources import REPORTS, Machine, read_folder, read_machines
from benchmarks.report.write import write_all
from benchmarks.table import rate, workload_rows
from benchmarks.workloads import WORKLOADS
from common.errors import UserError

KEPT = REPORTS / "cpu" / "ladder.json"
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write a results file in which each named stage makes its given tokens a second on a workload."""

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
    [machine] = read_folder(folder)
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


def test_a_figure_of_one_file_is_never_taken_from_another(put: Put, tmp_path: Path) -> None:
    put("a.json", {"m1": 1, "m2": 2, "llama.cpp BF16": 4})
    put("b.json", {"m1": 10, "m2": 30})
    machine = read(tmp_path / "cpu")
    speed = "mixed.{}.output_tokens_per_s"
    assert evaluate(machine, speed.format("m1")) == 1
    assert evaluate(machine, f"{speed.format('m1')}@b") == 10
    assert evaluate(machine, f"1 - {speed.format('llama.cpp BF16')} / {speed.format('m2')}") == -1
    assert evaluate(machine, f"{speed.format('m2')} / {speed.format('m1')}@b") == 3
    assert evaluate(machine, speed.format("llama.cpp BF16")) == 4
    assert evaluate(machine, f"{speed.format('llama.cpp BF16')}@b") is None
    assert evaluate(machine, f"{speed.format('m1')}@c") is None


def test_llama_cpp_is_compared_by_its_format(put: Put, tmp_path: Path) -> None:
    """4 bits with its fastest 4-bit format, 16 with 16; an older file's one row is that of the model's own format."""
    put("cpu_speed.json", {"m6": 6, "m7": 7, "llama.cpp Q4_0": 4, "llama.cpp BF16": 9, "llama.cpp Q4_1": 5})
    machine = read(tmp_path / "cpu")
    speed = "mixed.{}.output_tokens_per_s"
    assert evaluate(machine, speed.format("llama.cpp Q4")) == 5
    assert evaluate(machine, f"{speed.format('m7')} / {speed.format('llama.cpp Q4')}@cpu_speed") == 1.4
    assert evaluate(machine, speed.format("llama.cpp BF16")) == 9
    table = to_markdown(peer_rows([machine]), tmp_path)
    assert ["| m7 GPTQ | 7.0 | 1.75 |" in table, "| m6 prefix caching | 6.0 | 0.67 |" in table] == [True, True]
    put("old.json", {"m1": 1, "llama.cpp": 4}, machine="old")
    old = read(tmp_path / "old")
    assert evaluate(old, speed.format("llama.cpp Q4_1")) == evaluate(old, speed.format("llama.cpp Q4")) == 4


def test_ratios_on_a_cpu_are_of_one_run_and_say_what_was_wanted(put: Put, tmp_path: Path) -> None:
    put("cpu_speed.json", {"m6": 10, "m7": 12})
    put("other.json", {"m6": 10, "m7": 90, "m5": 1})
    machine = read(tmp_path / "cpu")
    assert [(claim.said, value) for claim, _, value in reached(machine)] == [("ragged requests, m7 over m6", 1.2)]
    text = to_markdown(cpu_blocks(machine), tmp_path)
    assert "| ragged requests, m7 over m6 | 1.1× | 1.20× | met |" in text and "`cpu/cpu_speed.json`" in text
    put("cpu_speed.json", {"m6": 12, "m7": 12})
    assert "| 1.00× | not met |" in to_markdown(cpu_blocks(read(tmp_path / "cpu")), tmp_path)
    for name, tokens in (("cpu_speed.json", 30), ("cpu_speed-before.json", 20)):
        path = put(name, {"m7": tokens})
        path.write_text(path.read_text().replace('"workload": "mixed"', '"workload": "single"'))
    machine = read(tmp_path / "cpu")
    assert [(claim.said, value) for claim, _, value in reached(machine)] == [
        ("one request, m7 over itself before", 1.5)
    ]
    assert {claim.figure.split(".")[0].strip("<") for claim in REACH} < set(WORKLOADS)


def test_prompts_a_second_are_what_is_not_output(put: Put, tmp_path: Path) -> None:
    path = put("cpu_speed.json", {"m6": 2})
    path.write_text(path.read_text().replace('"workload": "mixed"', '"workload": "prefill"'))
    values = json.loads(path.read_text())
    values["records"][0]["total_tokens_per_s"] = 1026
    path.write_text(json.dumps(values))
    [bench] = read(tmp_path / "cpu").benches
    assert workload_rows(bench.results, "prefill")[1][0][-1] == "1,024"


def test_runs_and_quarters_of_an_answer(put: Put, tmp_path: Path) -> None:
    path = put("a.json", {"m0": 2})
    values = json.loads(path.read_text())
    times = [[position, position / 10] for position in range(1, 9)]
    values["records"][0] |= {"output_tokens_per_s_repeats": [2, 3, 1], "itl_by_position": times}
    path.write_text(json.dumps(values))
    machine = read(tmp_path / "cpu")
    names = ["slowest_run", "fastest_run", "itl_first_quarter", "itl_last_quarter", "itl_growth"]
    assert [evaluate(machine, f"mixed.m0.{name}") for name in names] == pytest.approx([1, 3, 0.15, 0.75, 5])


@pytest.mark.parametrize("chosen", [{"options": {"fused_kernels": False}}, {"execution": "plain"}])
def test_an_ablation_is_never_taken_for_the_defaults(put: Put, tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Must not stand in for them, even where it has more stages, or is alone to have one."""
    put("a-plain.json", {"m1": 1, "m2": 1, "m3": 1}, **chosen)
    put("b.json", {"m1": 10, "m2": 30})
    machine = read(tmp_path / "cpu")
    assert evaluate(machine, "mixed.m1.output_tokens_per_s") == 10
    assert evaluate(machine, "mixed.m3.output_tokens_per_s") is None
    assert evaluate(machine, "mixed.m3.output_tokens_per_s@a-plain") == 1
    assert evaluate(machine, "mixed.m3.plain.output_tokens_per_s") == (1 if "execution" in chosen else None)


def test_a_ratio_is_never_of_two_files(put: Put, tmp_path: Path) -> None:
    put("a.json", {"m1": 1})
    put("b.json", {"m2": 30})
    machine = read(tmp_path / "cpu")
    assert evaluate(machine, "mixed.m2.output_tokens_per_s") == 30
    assert evaluate(machine, "mixed.m2.output_tokens_per_s / mixed.m1.output_tokens_per_s") is None


def test_a_figure_is_of_the_file_in_which_most_stages_ran_that_workload(put: Put, tmp_path: Path) -> None:
    """Must not be of one that merely has more records, nor silently of one of two."""
    put("a.json", {"m1": 1, "m2": 2})
    path = put("b.json", {"m1": 3, "m4": 4, "m5": 5})
    values = json.loads(path.read_text())
    for record in values["records"][1:]:
        record["workload"] = "single"
    path.write_text(json.dumps(values))
    name = "mixed.m1.output_tokens_per_s"
    assert evaluate(read(tmp_path / "cpu"), name) == 1
    put("c.json", {"m1": 7, "m2": 2})
    with pytest.raises(UserError, match=r"several files of cpu have it\. Name one: @a or @c"):
        evaluate(read(tmp_path / "cpu"), name)
    assert evaluate(read(tmp_path / "cpu"), f"{name}@c") == 7
    for number, file in enumerate(("c.json", "a.json")):  # one's own results: the newest
        shutil.copy(tmp_path / "cpu" / file, put(file, {"m1": 0}, machine="local"))
        os.utime(tmp_path / "local" / file, (number, number))
    assert evaluate(read(tmp_path / "local"), name) == 1


def test_a_time_in_attention_that_cannot_be_is_left_out_and_said(put: Put, tmp_path: Path) -> None:
    """The clock's own run took 45 s; the requests of the timed ones 35."""
    path = put("a.json", {"m3": 1, "m4": 1})
    values = json.loads(path.read_text())
    for record, spent in zip(values["records"], (45.3, 1.8), strict=True):
        record |= {"attention_time_s": spent, "e2e_s": {**record["e2e_s"], "max": 34.7}}
    path.write_text(json.dumps(values))
    machine = read(tmp_path / "cpu")
    assert [evaluate(machine, f"mixed.{stage}.attention_time_s") for stage in ("m3", "m4")] == [None, 1.8]
    reason = "a.json: mixed.m3: 45.3 s in attention, and its requests took 34.7 s: measure it again"
    assert machine.left_out == [reason]
    assert list(write_all(tmp_path))
    assert f"left out: {reason}" in (tmp_path / "report.md").read_text()


def peers(folder: Path, gpu: str = "NVIDIA H100 80GB HBM3", name: str = "h100.json", **changes: Any) -> None:
    kept = json.loads((REPORTS / "peers" / "h200.json").read_text())
    kept["environment"]["gpu"] = gpu
    row = {"workload": "nano", "seed": 0, "engine": "vllm"}
    speeds = [(0.0, 10.0), (0.0, 30.0), (0.0, 20.0), (0.6, 70.0)]
    kept["results"] = [{**row, "temperature": t, "run": 1, "output_tokens_per_s": s} for t, s in speeds]
    kept["results"] += [{**kept["results"][0], "seed": 2, "output_tokens_per_s": 99.0}]
    (folder / "peers").mkdir(exist_ok=True)
    (folder / "peers" / name).write_text(json.dumps(kept | changes))


def test_peers_are_read_from_the_file_of_the_same_gpu(put: Put, tmp_path: Path) -> None:
    """Greedy beside greedy, the median of several runs, the same workload; nothing from another GPU or model."""
    for machine, gpu, model in (("h100", "NVIDIA H100 80GB HBM3", MODEL), ("h200", "NVIDIA H200", MODEL),
                                ("other", "NVIDIA H100 80GB HBM3", "random:tiny-llama")):  # fmt: skip
        path = put("gpu-bench.json", {"m6": 40}, machine=machine, device="cuda", model=model)
        values = json.loads(path.read_text().replace('"workload": "mixed"', '"workload": "nano"'))
        values["environment"]["hardware"]["gpu"] = gpu
        path.write_text(json.dumps(values))
    peers(tmp_path)
    machines = read_machines(tmp_path)
    ratio = "nano.m6.output_tokens_per_s / reference.vllm.nano"
    assert {name: evaluate(machine, ratio) for name, machine in machines.items()} == {
        "h100": 2,
        "h200": None,
        "other": None,
    }
    assert evaluate(machines["h100"], "reference.vllm.nano.sampled") == 70
    assert evaluate(machines["h100"], "reference.vllm.decode_one") is None
    for wrong in ("reference.vlm.nano", "reference.vllm.mixed", "reference.vllm.nano.hot"):
        with pytest.raises(UserError, match=r"vllm|nano|greedy"):
            evaluate(machines["h100"], wrong)
    text = to_markdown(peer_blocks(machines["h100"]), tmp_path)
    rows = [re.sub(r" +", " ", line) for line in text.splitlines() if line.startswith("| 0")]
    assert rows == [
        "| 0 | vLLM 0.26.0 | 20 | – | – |", "| 0 | **m6 prefix caching** | 40 (200% of vLLM) | – | – |",
        "| 0.6 | vLLM 0.26.0 | 70 | – | – |",
    ]  # fmt: skip
    assert "ran greedy" in text and "another draw" in text and "FlashAttention-3" in text
    assert peer_blocks(machines["h200"]) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [("h100.json", {"schema": "peers-2"}, "schema peers-1"), ("h100.json", {"model": "Llama"}, "is of 'Llama'"),
     ("again.json", {}, "are of one GPU")],
)  # fmt: skip
def test_a_file_of_peers_that_says_something_else_is_refused(
    put: Put, tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    path = put("gpu-bench.json", {"m6": 40}, machine="h100", device="cuda", model=MODEL)
    values = json.loads(path.read_text())
    values["environment"]["hardware"]["gpu"] = "NVIDIA H100 80GB HBM3"
    path.write_text(json.dumps(values))
    peers(tmp_path)
    peers(tmp_path, name=name, **changes)
    with pytest.raises(UserError, match=words):
        read_machines(tmp_path)


@pytest.mark.parametrize("name", ["mixed", "mixed.m1", "mixed.m1.speed", "attention.triton", "quality.bf16"])
def test_a_name_that_cannot_exist_is_refused(put: Put, tmp_path: Path, name: str) -> None:
    """Must not be silently missing."""
    put("a.json", {"m1": 1})
    with pytest.raises(UserError, match=re.escape(name.split(".")[-1])):
        evaluate(read(tmp_path / "cpu"), name)


def test_quick_sizes_and_foreign_files_are_left_out(put: Put, tmp_path: Path) -> None:
    """Must not be taken for measurements."""
    put("a.json", {"m1": 1})
    put("quick.json", {"m1": 9}, quick=True)
    (tmp_path / "cpu" / "broken.json").write_text("{")
    (tmp_path / "cpu" / "other.json").write_text('{"x": 1}')
    machine = read(tmp_path / "cpu")
    assert [bench.path.name for bench in machine.benches] == ["a.json"]
    assert [reason.split(":")[0] for reason in machine.left_out] == ["broken.json", "other.json", "quick.json"]
    assert read_folder(tmp_path) == []


@pytest.mark.parametrize(("speed", "verdict"), [(30.0, MET), (99.0, MET), (29.0, NOT_MET)])
def test_a_verdict_is_that_of_the_figures(put: Put, tmp_path: Path, speed: float, verdict: str) -> None:
    put("a.json", {"m1": 10, "m2": speed})
    machine = read(tmp_path / "cpu")
    filler = Filler({"cpu": machine}, "cpu", tmp_path)
    found = judge(next(c for c in CLAIMS if c.said == "throughput 3–5×"), machine, filler)
    assert found.verdict == verdict
    assert found.value == f"{speed / 10:.1f}×"
    assert ("no request needs" in found.why) == (verdict == NOT_MET)
    absent = judge(next(c for c in CLAIMS if c.stage == "m5"), machine, filler)
    assert (absent.verdict, absent.why) == (NOT_MEASURED, "`make bench WORKLOAD=interference`")


def test_every_claim_can_be_looked_up() -> None:
    machines = read_machines()
    for claim in CLAIMS:
        assert claim.low is not None or claim.high is not None
        for name, machine in machines.items():
            found = judge(claim, machine, Filler(machines, name, REPORTS))
            assert "{" not in found.why
            assert found.verdict != NOT_MET or found.why, f"{claim.said}: not met, and nothing says why"


def test_a_cpu_is_never_compared_with_a_gpu(put: Put, tmp_path: Path) -> None:
    """Both wrote into reports/local: a ratio must not take one half from each."""
    put("a.json", {"m1": 10}, machine="local")
    put("gpu-bench.json", {"m1": 200, "m2": 900}, machine="local", device="cuda")
    put("b.json", {"m1": 10, "m2": 20})
    machines = read_machines(tmp_path)
    assert list(machines) == ["local", "local-gpu", "cpu"]
    speed = "mixed.m2.output_tokens_per_s / mixed.m1.output_tokens_per_s"
    assert [evaluate(machine, speed) for machine in machines.values()] == [None, 4.5, 2]
    assert [machine.is_gpu for machine in machines.values()] == [False, True, False]
    names = [path.relative_to(tmp_path).as_posix() for path in write_all(tmp_path)]
    assert "local/report.md" in names and "report.md" in names
    text = (tmp_path / "local" / "report.md").read_text()
    assert "(gpu-mixed-throughput.png)" in text
    assert (tmp_path / "local" / "gpu-mixed-throughput.png").is_file()
    assert "(yours)" in text and "(yours)" not in (tmp_path / "report.md").read_text()


def test_of_two_workloads_the_one_that_was_measured_is_taken(put: Put, tmp_path: Path) -> None:
    """`single.m7 or decode_one.m7`: a GPU's runs have the second only, and the verdict must say so."""
    put("a.json", {"m6": 10, "m7": 15})
    values = json.loads((tmp_path / "cpu" / "a.json").read_text())
    for record in values["records"]:
        record["workload"] = "decode_one"
    (tmp_path / "cpu" / "a.json").write_text(json.dumps(values))
    machine = read(tmp_path / "cpu")
    claim = next(c for c in CLAIMS if c.said == "speed +20–50 %, one request")
    found = judge(claim, machine, Filler({"cpu": machine}, "cpu", tmp_path))
    assert (found.verdict, found.workload, found.value) == (MET, "decode_one", "+50.0 %")


def test_context_in_equal_memory_is_interpolated(put: Put, tmp_path: Path) -> None:
    """m3's activations grow with the square: 100 MB at 1,000 tokens, 400 at 2,000. m4 needs 200 MB for 8,000."""
    put("a.json", {"m4": 1})
    path = tmp_path / "cpu" / "a.json"
    values = json.loads(path.read_text())
    pattern = values["records"][0]
    points = [("m3", 1000, 100e6), ("m3", 2000, 400e6), ("m4", 1000, 25e6), ("m4", 8000, 200e6)]
    values["records"][0]["workload"] = "long_context"
    values["sweeps"] = [
        {**pattern, "stage": s, "workload": "long_context", "variant": f"prompt={n}", "peak_activation_bytes": b}
        for s, n, b in points
    ]
    path.write_text(json.dumps(values))
    assert evaluate(read(tmp_path / "cpu"), "long_context.m4.longer_context") == pytest.approx(8 / 2**0.5)
    values["sweeps"] = values["sweeps"][2:]
    path.write_text(json.dumps(values))
    assert evaluate(read(tmp_path / "cpu"), "long_context.m4.longer_context") is None


def test_ways_of_execution_are_told_apart(put: Put, tmp_path: Path) -> None:
    def words(machine: Machine) -> str:
        return to_markdown(execution_blocks(machine), tmp_path)

    for way, speed in (("plain", 10), ("graphs", 30)):
        put(f"{way}.json", {"m6": speed}, machine="h100", options=WAYS[way], device="cuda")
    put("odd.json", {"m6": 77}, machine="h100", options={"block_size": 32}, device="cuda")
    put("all.json", {"m6": 40}, machine="h100", device="cuda")
    for path in (tmp_path / "h100").iterdir():
        path.write_text(path.read_text().replace('"workload": "mixed"', '"workload": "decode"'))
    text = words(read(tmp_path / "h100"))
    assert re.findall(r"\| (\d+\.\d) \|", text) == ["10.0", "30.0", "40.0"]
    assert "Not measured yet: *+ fused kernels* (`make gpu-bench MODEL=" in text
    put("all.json", {"m6": 40})
    assert execution_blocks(read(tmp_path / "cpu")) == []


def test_quality_and_interop_become_tables_and_figures(tmp_path: Path) -> None:
    """Must not be lists of anything."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    sizes = {"agreement": 0.9, "layer_bytes": 10**8, "model_bytes": 2 * 10**8}
    rows = [
        {"name": "int4 RTN, group 128", "perplexity": 50.0, **sizes},
        {"name": "int4 GPTQ, group 32", "perplexity": 36.0, **sizes, "layer_bytes": 29 * 10**6},
        {"name": "int4 GPTQ, group 128", "perplexity": 41.0, **sizes},
        {"name": "int4 GPTQ, group 32, act-order", "perplexity": 35.0, **sizes},
        {"name": "bf16", "perplexity": 33.0, **sizes},
    ]
    (folder / "quality.json").write_text(json.dumps({"model": "tiny", "context": 8, "tokens": 64, "rows": rows}))
    ours = {"4bit": {"largest_difference": 5e-5, "same_greedy_tokens": True}}
    (folder / "gptq_interop.json").write_text(json.dumps({"versions": {}, "ours": ours, "theirs": {}}))
    machine = read(folder)
    assert [sheet.kind for sheet in machine.sheets] == ["interop", "quality"]
    with pytest.raises(UserError, match=r"int4 GPTQ could be several rows of cpu .*act-order.*write a whole name"):
        evaluate(machine, "quality.int4 GPTQ.perplexity")
    over = "quality.int4 GPTQ, group 32.perplexity / quality.bf16.perplexity - 1"
    assert evaluate(machine, over) == pytest.approx(36 / 33 - 1)
    assert evaluate(machine, "quality.int4 RTN.perplexity") == 50, "the only one whose name begins so"
    smaller = "1 - quality.int4 GPTQ, group 32.layer_bytes / quality.bf16.layer_bytes"
    assert evaluate(machine, smaller) == pytest.approx(0.71)
    text = to_markdown([block for sheet in machine.sheets for block in sheet_blocks(sheet)], tmp_path)
    assert "| m7 | 4bit | 5e-05 | yes |" in text
    assert "Not measured yet: checkpoints written by GPTQModel" in text
    assert text.index("| bf16 |") < text.index("| int4 RTN")
    assert "+9.1%" in text


def test_figures_of_another_machine_are_marked(put: Put, tmp_path: Path) -> None:
    """Readers must not take them for figures of their own machine."""
    put("a.json", {"m1": 10, "m2": 30})
    put("a.json", {"m1": 77}, machine="local")
    machines = read_machines(tmp_path)
    assert list(machines) == ["local", "cpu"]
    filler = Filler(machines, "local", tmp_path, "en", "cpu")
    text = (
        "{figure:mixed.m1.output_tokens_per_s} {figure:mixed.m2.output_tokens_per_s} {figure:h100:nano.m6.ttft_s.p50|s}"
    )
    assert filler.fill(text) == "77.0 30.0† *not measured yet: run `make gpu-bench`*"


def test_placeholders_that_point_nowhere_are_refused(tmp_path: Path) -> None:
    filler = Filler({}, "cpu", REPORTS)
    assert filler.fill("{code:common/engine.py:Engine.step}").startswith("[`Engine.step`](../common/engine.py#L")
    for wrong in ("{code:common/engine.py:Engine.stop}", "{code:common/none.py:x}"):
        with pytest.raises(UserError, match="placeholder"):
            filler.fill(wrong)
    lines = (REPORTS.parent / "common" / "engine.py").read_text().splitlines()
    line = lines[line_of("common/engine.py", "Engine.step") - 1]
    assert line.strip().startswith("def step(")


def test_the_page_needs_nothing_beside_itself(put: Put, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    shutil.copy(KEPT, tmp_path / "cpu" / "ladder.json")
    names = [path.name for path in write_all(tmp_path)]
    pages = [f"interview_{page}{language}.md" for page in ("guide", "tomorrow") for language in ("", ".zh-CN")]
    assert names == ["report.html", "report.md", *pages]
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert any(source.startswith("data:image/png;base64,") for source in sources)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert {a[1:] for a in sources if a[0] == "#"} <= set(re.findall(r'id="([^"]*)"', page))
    assert "prefers-color-scheme: dark" in page
    speed = Results.read(KEPT).records[1].output_tokens_per_s
    assert speed is not None
    assert f"{rate(speed)} ±" in page
    text = (tmp_path / "report.md").read_text()
    assert f"{rate(speed)} ±" in text
    assert (tmp_path / "cpu" / "ladder-throughput.png").is_file()
    assert re.search(r"!\[[^\]]*\]\(cpu/ladder-throughput\.png\)", text)


def test_no_results_are_one_line(tmp_path: Path) -> None:
    """Must not be a traceback."""
    with pytest.raises(UserError, match="make bench"):
        list(write_all(tmp_path))


@pytest.mark.parametrize(
    "path",
    sorted([*REPORTS.glob("cpu/*.json"), *REPORTS.glob("h?00/**/*.json")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_kept_figures_say_where_they_come_from(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))["environment"]
    assert found["hardware"]["cpu"] and found["versions"]["torch"]
    assert found["commit"] or found["commit_note"]
