"""A whole quick comparison, from the command line to the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from benchmarks.__main__ import NAME
from benchmarks.compare import Results, contestants, earlier_results, make_comparison, run
from benchmarks.environment import environment
from benchmarks.peers import PEERS
from benchmarks.process import run_worker
from benchmarks.record import Record
from benchmarks.worker import Job
from common.errors import UserError
from tests.benchmarks.conftest import TINY, Done, bench_here, run_bench
from tests.helpers import freeze

FIELDS = [
    "stage",
    "workload",
    "status",
    "repeats",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "requests_per_s",
    "ttft_s",
    "tpot_s",
    "itl_s",
    "e2e_s",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "kv_pool_bytes",
    "kv_reserved_bytes",
    "kv_used_peak_bytes",
    "kv_utilization",
    "padding_share",
    "peak_running",
    "preemptions",
    "prefix_hit_rate",
    "tokens_saved",
    "gpu_utilization",
    "error",
]


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def test_one_record_for_each_stage_and_workload(comparison: Done) -> None:
    done, folder = comparison
    assert done.returncode == 0, done.stderr
    found = load(folder)
    keys = [(r["stage"], r["workload"], r["status"]) for r in found["records"]]
    assert keys == [("m0", "ladder", "ok"), ("m1", "mixed", "ok"), ("m0", "single", "ok"), ("m1", "single", "ok")]
    assert "instead" in found["records"][0]["note"]
    assert found["records"][1]["note"] is None


def test_the_file_has_the_promised_fields(comparison: Done) -> None:
    found = load(comparison[1])
    assert set(found) == {"schema", "environment", "config", "took_s", "records", "sweeps", "plain"}
    assert found["took_s"] > sum(record["e2e_s"]["max"] for record in found["records"])
    assert {"hardware", "versions", "commit"} <= set(found["environment"])
    for record in found["records"] + found["sweeps"]:
        assert list(record)[: len(FIELDS)] == FIELDS
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            assert set(record[name]) == {"mean", "p50", "p90", "p99", "max"}
            assert record[name]["p50"] <= record[name]["p90"] <= record[name]["p99"] <= record[name]["max"]


def test_figures_agree_with_each_other(comparison: Done) -> None:
    m0, mixed, _, single = load(comparison[1])["records"]
    assert mixed["repeats"] == 2
    assert sorted(mixed["output_tokens_per_s_repeats"])[0] == mixed["output_tokens_per_s"]
    assert 0 < mixed["kv_used_peak_bytes"] < mixed["kv_reserved_bytes"] <= mixed["kv_pool_bytes"]
    assert 0 < mixed["kv_utilization"] < 1
    assert 0 < mixed["padding_share"] < 1
    assert mixed["peak_running"] == 4
    assert m0["peak_running"] == 2
    assert m0["kv_pool_bytes"] == 0
    assert m0["kv_utilization"] is None
    assert mixed["total_tokens_per_s"] > mixed["output_tokens_per_s"]
    assert mixed["peak_memory_bytes"] > 50e6
    assert mixed["peak_device_memory_bytes"] is None
    assert len(single["itl_by_position"]) == 7
    assert mixed["itl_by_position"] is None


def test_a_sweep_has_a_point_for_each_variant_and_m0_stops_early(comparison: Done) -> None:
    sweeps = load(comparison[1])["sweeps"]
    assert [r["variant"] for r in sweeps if r["stage"] == "m1"] == [f"output={n}" for n in (64, 128, 256, 512, 1024)]
    assert [r["variant"] for r in sweeps if r["stage"] == "m0"] == [f"output={n}" for n in (64, 128, 256)]


def test_the_table_says_what_m0_ran_and_pictures_are_drawn(comparison: Done) -> None:
    done, folder = comparison
    assert "m0 on ladder" in done.stdout
    assert "m0 ran `ladder` instead" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line[:40]) <= 120
    pictures = sorted(p.name for p in folder.glob("*.png"))
    shared = [f"{w}-{p}.png" for w in ("mixed", "single") for p in ("latency", "memory", "throughput")]
    assert pictures == sorted([*shared, "single-time-per-token.png"])
    assert all((folder / name).stat().st_size > 10_000 for name in pictures)
    assert not list(folder.glob(".*")), "scratch files left behind"


def test_report_redraws_from_the_file(comparison: Done, tmp_path: Path) -> None:
    done = bench_here("report", "--json", str(comparison[1] / "bench.json"), "--out-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "output" in done.stdout
    assert len(list(tmp_path.glob("*.png"))) == 7


NO_ROOM = ["--repeats", "1", "--engine", "kv_cache_memory=1000", *TINY]
"""A KV budget in which no request fits: m1 must fail, m0 needs none."""


def test_a_failed_stage_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    """The whole of it in processes of their own: the command, and a worker for each stage."""
    done = run_bench("compare", "--stages", "m1,m0", "--json", str(tmp_path / "bench.json"), *NO_ROOM)
    assert done.returncode == 1, "a stage failed"
    m0, m1 = load(tmp_path)["records"]
    assert (m0["stage"], m0["status"], m0["error"]) == ("m0", "ok", None)
    assert (m1["stage"], m1["status"]) == ("m1", "failed")
    assert "kv_cache_memory" in m1["error"]
    assert m1["output_tokens_per_s"] is None
    assert "m1 failed: kv_cache_memory" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_resume_keeps_what_is_there_and_runs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_and_note(job: Job, *rest: Any) -> Record:
        ran.append(job.stage)
        return run_worker(job, *rest)

    monkeypatch.setattr("benchmarks.compare.run_worker", run_and_note)
    arguments = ("compare", "--stages", "m0,m1", "--json", str(tmp_path / "bench.json"))
    assert bench_here(*arguments, *NO_ROOM).returncode == 1
    before = load(tmp_path)["records"][0]
    other = bench_here(*arguments, "--resume", "--repeats", "1", *TINY)
    assert other.returncode == 2
    assert "other values of options" in other.stderr
    again = bench_here(*arguments, "--resume", *NO_ROOM)
    assert again.returncode == 1
    assert load(tmp_path)["records"][0] == before
    assert ran == ["m0", "m1", "m1"]


@pytest.mark.parametrize("changed", [{"commit": "another"}, {"hardware": {"cpu": "another machine"}}], ids=str)
def test_resume_refuses_what_another_commit_or_machine_measured(tmp_path: Path, changed: dict[str, object]) -> None:
    """A file names one commit and one machine: records of another one do not get their names."""
    plan = make_comparison(["m1"], ["single"], peers=False, dtype="bf16", device="cpu", model="random:tiny-llama")
    path = tmp_path / "bench.json"
    here = Results(environment(), plan.config(), [Record("m1", "single")])
    path.write_text(json.dumps(here.to_json()))
    assert earlier_results(plan, path) == here
    path.write_text(json.dumps({**here.to_json(), "environment": {**environment(), **changed}}))
    with pytest.raises(UserError, match="another commit or on another machine"):
        earlier_results(plan, path)


@pytest.mark.parametrize(
    "broken", [{"config": None}, {"environment": []}, {"records": [3]}, {"config": "text"}], ids=str
)
def test_a_broken_results_file_is_one_line(tmp_path: Path, broken: dict[str, object]) -> None:
    """Must not be a traceback."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**Results({}, {}).to_json(), **broken}))
    with pytest.raises(UserError, match="another version of the bench"):
        Results.read(path)


def test_stages_and_peers_on_a_quantised_folder(quantised_folder: Path, tmp_path: Path) -> None:
    """m7 multiplies by the 4-bit weights; others, dequantised, say so in the table."""
    model = ["--model", str(quantised_folder), "--quick", "--device", "cpu", "--repeats", "1"]
    done = bench_here("compare", "--stages", "m6,m7", "--json", str(tmp_path / "bench.json"), *model)
    assert done.returncode == 0, done.stderr
    m6, m7 = load(tmp_path)["records"]
    assert "dequantised at load from 4-bit GPTQ, groups of 32" in m6["note"]
    assert "dequantised" not in str(m7["note"])
    assert "m6: attention" in done.stdout


def test_a_bench_quantises_once_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one says what it does and how long it took; the second takes what the first has made."""
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "cache"))
    model = freeze("random:tiny-llama", tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    options = ["--stages", "m7", "--model", model, "--quick", "--device", "cpu", "--repeats", "1"]
    first, second = (bench_here("compare", *options, "--json", str(tmp_path / "bench.json")) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert "to 4 bits, once: it will be kept in" in first.stderr
    assert re.search(r"quantised .* in \d+ s", first.stderr)
    assert "quantis" not in second.stderr


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte: calibration needs a tokenizer, and tiny models have 512 tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def test_contestants_take_any_spelling_and_come_in_order() -> None:
    formats = [f"llama.cpp {kind}" for kind in ("Q4_0", "BF16", "Q4_1")]
    assert contestants(["llama.cpp", "stage1", "m0_baseline", "1"], peers=False) == ["m0", "m1", *formats]
    assert contestants(NAME.findall("m6,llama.cpp BF16 m1"), peers=False) == ["m1", "m6", "llama.cpp BF16"]
    assert contestants([], peers=True)[-3:] == formats
    assert contestants(["m1"], peers=True) == ["m1", *PEERS]
    assert contestants([], peers=False)[:2] == ["m0", "m1"]


def test_results_survive_a_round_trip(tmp_path: Path) -> None:
    plan = make_comparison(["m1"], ["single"], peers=False, dtype="bf16", device="cpu", model="random:tiny-llama")
    results = Results({"commit": None}, plan.config())
    results.add(Record("m1", "single"))
    results.add(Record("m1", "single", variant="output=64"))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(results.to_json()))
    assert Results.read(path) == results


def test_contestants_take_turns_and_the_median_round_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []
    speeds = iter([3.0, 10.0, 1.0, 30.0, 2.0, 20.0])

    def run_and_note(job: Job, *_: Any) -> Record:
        ran.append((job.workload, job.stage))
        speed = next(speeds)
        return Record(
            job.stage, job.workload, repeats=1, output_tokens_per_s=speed, output_tokens_per_s_repeats=[speed]
        )

    monkeypatch.setattr("benchmarks.compare.run_worker", run_and_note)
    plan = make_comparison(
        ["m1", "m2"],
        ["single"],
        peers=False,
        model="random:tiny-llama",
        dtype="fp32",
        device="cpu",
        quick=True,
        rounds=3,
    )
    results = run(plan, tmp_path / "bench.json", lambda *_: lambda _: None, lambda _: None)
    assert ran == [("single", "m1"), ("single", "m2")] * 3
    assert [(r.stage, r.output_tokens_per_s, r.repeats) for r in results.records] == [("m1", 2.0, 3), ("m2", 20.0, 3)]
    assert results.records[0].output_tokens_per_s_repeats == [3.0, 1.0, 2.0]
    again = run(plan, tmp_path / "bench.json", lambda *_: lambda _: None, lambda _: None, resume=True)
    assert len(ran) == 6 and again.records == results.records
