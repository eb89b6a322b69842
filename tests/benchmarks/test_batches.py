"""The sweep over batches, at sizes that measure nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import batches
from benchmarks.plots.batches import batches_figure
from common.errors import UserError

TINY = "random:tiny-qwen3"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batches") / "batches.json"
    batches.run("m6", TINY, "cpu", "fp32", path, quick=True, repeats=1)
    return path


def test_every_batch_is_measured_in_every_way_of_sampling(path: Path) -> None:
    values = json.loads(path.read_text())
    found = {(r["batch"], r["sampling"]): r for r in values["records"]}
    assert set(found) == {(name, way) for name in ("1", "3", "nano") for way in batches.SAMPLINGS}
    assert all(r["output_tokens_per_s"] > 0 and values["limits"][r["batch"]] > 0 for r in values["records"])
    assert all(("host_us_per_row" in r) == (r["sampling"] == batches.GREEDY) for r in values["records"])
    assert path.with_name("batches.png").exists()


def test_no_prompt_is_asked_for_twice() -> None:
    """A prefix cache would answer it."""
    asked = [tuple(r.prompt) for number in range(4) for r in batches.requests("3", "quick", 1 << 30, number)]
    assert len(set(asked)) == 12


def test_an_interrupted_run_goes_on_where_it_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(path.read_text())
    whole = len(values["records"])
    values["records"] = [r for r in values["records"] if r["batch"] != "3"]
    path.write_text(json.dumps(values))
    asked: list[str] = []
    requests = batches.requests
    monkeypatch.setattr(batches, "requests", lambda name, *a: (asked.append(name), requests(name, *a))[1])
    assert len(batches.run("m6", TINY, "cpu", "fp32", path, quick=True, repeats=1)["records"]) == whole
    assert set(asked) == {"3"}


def test_results_of_other_settings_are_kept(path: Path) -> None:
    with pytest.raises(UserError, match="other settings"):
        batches.run("m6", TINY, "cpu", "bf16", path, quick=True)


def test_peers_are_drawn_only_on_the_gpu_that_they_ran_on(path: Path) -> None:
    values: dict[str, Any] = json.loads(path.read_text())

    def labels() -> str:
        return " ".join(batches_figure(values, "").axes[0].get_legend_handles_labels()[1])

    assert "vllm" not in labels()
    values["environment"]["hardware"]["gpu"] = "NVIDIA H200"
    assert "vllm, greedy" in labels() and "nano-vllm, temperature 0.6" in labels()
