"""`long_context`: a sweep in which a stage fails from some length on, from the command line to the picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot as plt
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.compare import Results, make_comparison
from benchmarks.plots.by_length import by_length
from benchmarks.plots.position import time_by_position
from benchmarks.record import Record
from common.errors import UserError
from tests.benchmarks.conftest import TINY, Done, bench_here


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """m0 and m3 with KV memory for 64 tokens: m3 can do prompts of 16 and 32, not those of 64 and 128."""
    folder = tmp_path_factory.mktemp("long")
    done = bench_here(
        "compare", "--stages", "m0,m3", "--workload", "long_context", "--sweep", "--repeats", "1",
        "--engine", f"kv_cache_memory={64 * 2 * 2 * 2 * 16 * 4}", "--json", str(folder / "bench.json"), *TINY,
    )  # fmt: skip
    return done, folder


def test_a_stage_fails_at_a_length_and_goes_on_at_others(swept: Done) -> None:
    done, folder = swept
    found = json.loads((folder / "bench.json").read_text())
    assert [(r["stage"], r["workload"], r["status"]) for r in found["records"]] == [
        ("m0", "ladder", "ok"),
        ("m3", "long_context", "failed"),
    ]
    assert [(r["stage"], r["variant"], r["status"]) for r in found["sweeps"]] == [
        ("m0", "prompt=512", "ok"),
        ("m3", "prompt=512", "ok"),
        ("m3", "prompt=1024", "ok"),
        ("m3", "prompt=2048", "failed"),
    ]
    assert done.returncode == 1
    assert "m3 failed at prompt=2048: prompt and output, 66 tokens" in " ".join(done.stdout.split())


def test_probed_points_have_the_two_figures_and_others_have_none(swept: Done) -> None:
    found = json.loads((swept[1] / "bench.json").read_text())
    m0_on_ladder = found["records"][0]
    assert m0_on_ladder["attention_time_s"] is None
    assert m0_on_ladder["peak_activation_bytes"] is None
    for record in found["sweeps"][:3]:
        assert 0 < record["attention_time_s"] < 10
        assert record["peak_activation_bytes"] is not None
        assert record["peak_activation_bytes"] < record["peak_memory_bytes"]


def test_the_picture_bears_the_workloads_name(swept: Done) -> None:
    picture = matplotlib.image.imread(swept[1] / "long_context.png")
    assert np.std(picture) > 0.05
    assert not (swept[1] / "long_context-.png").exists()


def made_up(**times: list[float | None]) -> Results:
    """Seconds in attention of each stage at 512, 1024, ...; None: out of memory."""
    plan = make_comparison(
        list(times), ["long_context"], peers=False, dtype="bf16", device="cpu", model="random:tiny-llama", sweep=True
    )
    results = Results({"hardware": {"cpu": "a CPU", "threads": 1}}, plan.config())
    for stage, column in times.items():
        for length, seconds in zip((512, 1024, 2048), column, strict=True):
            record = Record.failed(stage, "long_context", "out of memory: no room", variant=f"prompt={length}")
            if seconds is not None:
                ttft = dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 2 * seconds)
                record = Record(stage, "long_context", ttft_s=ttft, variant=f"prompt={length}",
                                attention_time_s=seconds, peak_activation_bytes=int(seconds * 1e9))  # fmt: skip
            results.add(record)
    return results


@pytest.mark.parametrize(
    ("times", "finding"),
    [
        ({"m3": [1.0, 4.0, None], "m4": [0.5, 1.0, 2.0]},
         "At 1,024 tokens m4 flash attention needs 25% of the attention time and 25% of the activation memory of "
         "m3 paged KV; m3 fails at 2,048"),
        ({"m1": [1.0, None, None], "m2": [1.0, 2.0, None], "m3": [0.01, 0.02, None]},
         "At 1,024 tokens m3 paged KV needs 1.0% of the attention time and 1.0% of the activation memory of "
         "m2 continuous batching; m1 fails at 1,024; m2 and m3 fail at 2,048"),
        ({"m3": [1.0, 2.0, 3.0], "m4": [2.0, 4.0, 9.6]},
         "At 2,048 tokens m4 flash attention needs 3.2 times the attention time and 3.2 times the activation memory "
         "of m3 paged KV"),
        ({"m4": [1.0, 2.0, None]},
         "m4 flash attention: time and memory against the length of the prompt; m4 fails at 2,048"),
    ],
)  # fmt: skip
def test_the_title_states_the_finding(times: dict[str, list[float | None]], finding: str) -> None:
    figure = by_length(made_up(**times), "long_context")
    assert figure is not None
    title = figure.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    marks = sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "X")  # type: ignore[arg-type]
    plt.close(figure)
    assert title == finding
    assert marks == sum(column.count(None) for column in times.values())


def test_one_length_is_no_picture() -> None:
    assert by_length(made_up(m4=[1.0, None, None]), "long_context") is None
    assert by_length(made_up(m4=[1.0, 2.0, 3.0]), "mixed") is None


def positions(prompt: int, tokens: int) -> Results:
    results = made_up(m3=[None] * 3, m4=[None] * 3)
    for stage in ("m3", "m4"):
        gaps = [[prompt + i, 0.001] for i in range(tokens)]
        results.add(Record(stage, "long_context", itl_by_position=gaps))
    return results


def test_a_name_stays_beside_its_line_after_a_long_prompt() -> None:
    """Must not fly off."""
    figure = time_by_position(positions(8000, 60), "long_context")
    assert figure is not None
    axis = figure.axes[0]
    names = [text.get_position()[0] for text in axis.texts]
    plt.close(figure)
    assert len(names) == 2
    assert all(8059 < x < 8065 for x in names)
    assert axis.get_xlim()[1] < 8100


def test_a_few_tokens_after_a_long_prompt_draw_no_trend() -> None:
    assert time_by_position(positions(8000, 15), "long_context") is None


def test_the_kernel_bench_has_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as users have it: the interpreter takes seconds a step
    done = CliRunner().invoke(
        app, ["attention", "--quick", "--device", "cpu", "--dtype", "fp32", "--out-dir", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attention-roofline.png", "attention.json"]
    assert "ceilings in this run" in done.stdout
    (tmp_path / "attention-roofline.png").unlink()
    again = CliRunner().invoke(app, ["report", "--json", str(tmp_path / "attention.json")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "attention-roofline.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        CliRunner().invoke(app, ["attention", "--device", "tpu", "--out-dir", str(tmp_path)], catch_exceptions=False)
