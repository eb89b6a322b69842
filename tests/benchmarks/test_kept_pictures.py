"""The pictures in the repository are those that the code draws of the results as they are, and can be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.attention import specified
from benchmarks.compare import Results
from benchmarks.environment import ROOT
from benchmarks.files import read_json
from benchmarks.plots.by_length import by_length
from benchmarks.plots.latency import latency
from benchmarks.plots.memory import memory
from benchmarks.plots.roofline import roofline
from benchmarks.plots.throughput import throughput
from benchmarks.report.pictures import draw
from benchmarks.report.sources import read_folder

REPORTS = ROOT / "reports"
KEPT = sorted(path for path in REPORTS.glob("*/*.png") if path.parent.name != "local")
WITHOUT_SOURCE = {"pictures", "m6_profile.png", "busy.png", "replicas.png"}
"""Traces are recorded by `make stage3 trace`; numbers of the profile were not kept; tests/busy and
tests/scale draw their own."""
SHOWN_WIDTH, SMALLEST = 830, 11.5
"""Pixels of a page's column, and points of the smallest text."""


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_text_has_eleven_pixels_where_a_page_shows_it(path: Path) -> None:
    with Image.open(path) as picture:
        dots = picture.info["dpi"][0] / 72
        assert SMALLEST * dots * SHOWN_WIDTH / picture.width > 10.9


def drawn_again(machine: str, copied: list[str], folder: Path) -> list[Path]:
    """The pictures of these JSON files and pictures of a machine, drawn in a copy of its folder."""
    (folder / machine).mkdir()
    for name in copied:
        shutil.copy(REPORTS / machine / name, folder / machine)
    return [picture.path for found in read_folder(folder / machine) for picture in draw(found, again=True)]


@pytest.mark.parametrize(
    ("machine", "source", "picture"),
    [("h100", "gpu-ladder.json", "mixed-throughput.png"), ("cpu", "attention.json", "attention-roofline.png")],
)
def test_a_kept_picture_is_what_is_drawn_of_its_results(
    machine: str, source: str, picture: str, tmp_path: Path
) -> None:
    assert drawn_again(machine, [source, picture], tmp_path) == [tmp_path / machine / picture]
    assert_same(REPORTS / machine / picture, tmp_path / machine / picture)


@pytest.mark.slow
@pytest.mark.parametrize("machine", sorted({path.parent.name for path in KEPT} - WITHOUT_SOURCE))
def test_all_kept_pictures_are_what_is_drawn_of_their_results(machine: str, tmp_path: Path) -> None:
    files = [path.name for path in (REPORTS / machine).iterdir() if path.is_file()]
    for drawn in drawn_again(machine, files, tmp_path):
        assert_same(REPORTS / machine / drawn.name, drawn)


def assert_same(path: Path, again: Path) -> None:
    with Image.open(path) as kept, Image.open(again) as drawn:
        if kept.info["Software"] != drawn.info["Software"]:
            pytest.skip(f"drawn by another matplotlib than {matplotlib.__version__}")
        what = f"{path.name}: python -m benchmarks report --redraw"
        assert kept.size == drawn.size, what
        assert np.array_equal(np.asarray(kept), np.asarray(drawn)), what


def test_every_kept_picture_has_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drawing them."""
    monkeypatch.setattr("benchmarks.report.pictures.save_picture", lambda path, draw: path)
    monkeypatch.setattr("benchmarks.plots.picture.save_picture", lambda path, draw: path)
    monkeypatch.setattr("benchmarks.plots.save_picture", lambda path, draw: path)
    some = Figure()
    names = ("throughput", "latency", "memory", "time-per-token", "block-size", "stalls", "chunk-size", "hit-rate",
             "by-turn", "")  # fmt: skip
    monkeypatch.setattr("benchmarks.plots.PICTURES", dict.fromkeys(names, lambda *_: some))
    known = {p.path for folder in {path.parent for path in KEPT} for m in read_folder(folder) for p in draw(m, True)}
    assert {path for path in set(KEPT) - known if not {path.name, path.parent.name} & WITHOUT_SOURCE} == set()


def title_of(figure: Figure | None) -> str:
    assert figure is not None
    text = figure.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    plt.close(figure)
    return text


def notes_of(figure: Figure | None) -> str:
    assert figure is not None
    text = figure.texts[-1].get_text().replace("\n", " ")
    plt.close(figure)
    return text


def kept(path: str) -> Results:
    return Results.read(REPORTS / path)


def test_an_idea_with_nothing_to_do_gets_no_credit() -> None:
    """m6 is the fastest on `mixed`, whose prompts share nothing, and the soonest on `single`."""
    mixed, single = kept("h200/gpu-ladder.json"), kept("cpu/bench.json")
    figure = throughput(mixed, "mixed")
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "m6 prefix caching\n(no shared prefix)" in names and "m7 GPTQ" in names
    assert "nothing to do" in notes_of(figure)
    assert title_of(throughput(mixed, "mixed")).startswith("m5 chunked prefill generates")
    assert "m6" not in title_of(latency(single, "single"))
    assert title_of(memory(single, "mixed")).startswith("m3 paged KV fills")
    for record in mixed.plain + mixed.records:
        record.tokens_saved = 1 if record.stage == "m6" else record.tokens_saved
        record.output_tokens_per_s = 2e4 if record.stage == "m6" else record.output_tokens_per_s
    assert title_of(throughput(mixed, "mixed")).startswith("m6 prefix caching generates")


def test_one_run_is_called_one_run() -> None:
    results = kept("h200/gpu-ladder.json")
    assert notes_of(throughput(results, "mixed")).startswith("Bar: one run. ")
    results.records[3].output_tokens_per_s_repeats = [1.0, 2.0, 3.0]
    assert "Bar: the median run (m0, m1, m2, m4" in notes_of(throughput(results, "mixed"))


def test_other_engines_stand_beside_the_stages_on_their_gpu_only() -> None:
    results = kept("h100/gpu-bench.json")
    assert "vLLM" not in title_of(throughput(results, "nano"))
    results.environment["hardware"]["gpu"] = "NVIDIA H200"
    figure = throughput(results, "nano")
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[2:] == [
        "vLLM 0.26.0\n(greedy)",
        "nano-vllm commit bb823b3\n(temperature 0.6)",
        "mini-sglang commit 20fcd7f\n(greedy)",
    ]
    assert title_of(figure).endswith("times as many tokens per second as vLLM 0.26.0")
    assert title_of(throughput(results, "decode_one")).startswith("m6 with execution"), "m7 reads fewer bytes"
    results.config["model"] = "random:llama3-1b"
    assert "vLLM" not in title_of(throughput(results, "nano"))


def test_attention_that_took_longer_than_its_request_is_left_out() -> None:
    results = kept("h100/long.json")
    assert "Left out" not in notes_of(by_length(results, "long_context"))
    point = results.records[0]
    assert point.e2e_s is not None
    point.attention_time_s = point.e2e_s["max"] * 1.01
    figure = by_length(results, "long_context")
    assert "Left out: m3's attention at 16,384, longer than its request." in notes_of(figure)
    assert "attention time" not in title_of(figure), "its neighbour has nothing to be compared with"


def test_a_roof_that_can_be_exceeded_is_called_a_copy() -> None:
    """Reading alone is faster than a copy; no kernel exceeds what clock and bus allow."""
    values = read_json(REPORTS / "h100/attention.json")
    figure = roofline(values, "an H100")
    assert "of a copy's speed" in title_of(figure)
    assert any("reading alone can be faster" in text.get_text() for text in figure.axes[0].texts)
    values["ceilings"]["specified_gb_per_s"] = 3352.0
    figure = roofline(values, "an H100")
    roof = figure.axes[0].lines[0]
    xs, ys = np.asarray(roof.get_xdata()), np.asarray(roof.get_ydata())
    plt.close(figure)
    for record in values["records"]:
        assert record["tflop_per_s"] < np.interp(record["flop_per_byte"], xs, ys) * 1.001, record


def test_a_gpus_bandwidth_is_two_transfers_a_clock_over_its_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100's: 2,619 MHz, 5,120 bits."""
    h100 = SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    assert specified(torch.device("cuda", 0))["specified_gb_per_s"] == pytest.approx(3352, abs=1)
    assert specified(torch.device("cpu")) == {}
    del h100.memory_bus_width
    assert specified(torch.device("cuda", 0)) == {}
