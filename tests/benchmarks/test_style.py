"""A stage has one colour, and numbers are written so that a reader can take them in."""

from __future__ import annotations

import pytest
from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.peers import PEERS
from benchmarks.plots.throughput import throughput
from benchmarks.record import Record
from benchmarks.style import PEER_COLORS, STAGE_COLORS, STAGE_TITLES
from benchmarks.table import factor, rate, seconds, size


def test_every_stage_and_peer_has_a_colour_of_its_own() -> None:
    colors = [*STAGE_COLORS.values(), *PEER_COLORS.values()]
    assert len(set(colors)) == len(colors)
    assert list(STAGE_COLORS) == list(STAGE_TITLES) == [f"m{i}" for i in range(8)]
    assert set(PEER_COLORS) == set(PEERS)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (seconds(0.00312), "3.1 ms"),
        (seconds(0.4204), "420 ms"),
        (seconds(2.44), "2.4 s"),
        (seconds(None), "–"),
        (size(1.44e9), "1.4 GB"),
        (size(12_300_000), "12 MB"),
        (size(900), "1 kB"),
        (rate(12.34), "12.3"),
        (rate(12345.6), "12,346"),
    ],
)
def test_numbers_are_short(written: str, expected: str) -> None:
    assert written == expected


def test_a_factor_across_two_workloads_is_marked() -> None:
    m0 = Record("m0", "ladder", output_tokens_per_s=2.0)
    m1 = Record("m1", "mixed", output_tokens_per_s=5.0)
    assert factor(m1, m0) == "≈2.50"
    assert factor(Record("m1", "ladder", output_tokens_per_s=50.0), m0) == "25"
    assert factor(m0, m0) == factor(m1, None) == factor(m1, Record.failed("m0", "mixed", "x")) == "–"


def test_a_picture_says_what_sets_a_peer_apart() -> None:
    note = "runs Q4_1.gguf; KV cache in float16"
    records = [
        Record("m0", "single", note="m0 ran another"),
        Record("m1", "single"),
        Record("llama.cpp Q4_0", "single"),
    ]
    for number, record in enumerate(records, 1):
        record.output_tokens_per_s = 10.0 * number
        record.output_tokens_per_s_repeats = [10.0 * number]
    config = {
        "model": "x",
        "dtype": "bf16",
        "device": "cpu",
        "quick": False,
        "contestants": ["m0", "m1", "llama.cpp Q4_0"],
    }
    results = Results({"hardware": {"cpu": "a CPU", "threads": 1}}, config, records)
    footnotes: list[str] = []
    for records[2].note in (None, note):
        figure = throughput(results, "single")
        assert figure is not None
        footnotes.append(figure.texts[-1].get_text())
        plt.close(figure)
    without, footnote = footnotes
    assert "llama.cpp Q4_0: " not in without
    assert f"\nllama.cpp Q4_0: {note}\nsingle · x · bf16" in footnote
    assert "ran another" not in footnote
