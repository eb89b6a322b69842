"""`make stage3`: each scene shows what its two engines did. What it says is compared with what must come out."""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import common.cli.scenes.scenes as scenes
import stages
from common.cli.demo import demo
from common.cli.scenes.view import View
from common.config import EngineConfig
from common.engine import Engine
from common.errors import UserError
from common.watch.peak_memory import ActivationPeak
from tests.test_cli import TINY as TINY_OPTIONS
from tests.test_cli import Terminal

ROOT = Path(__file__).parent.parent
TINY = EngineConfig(model="random:tiny-llama", device="cpu")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    return Shown(capsys, monkeypatch)


class Shown:
    """The demonstration of a stage, as it goes into a pipe: what it says of the stage before, and of itself."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        monkeypatch.setenv("COLUMNS", "80")

    def __call__(self, stage: str, config: EngineConfig = TINY) -> tuple[str, str]:
        folder = stages.resolve(stage)
        demo(ROOT / "stages" / folder, importlib.import_module(f"stages.{folder}.engine").build, config)
        out = self._capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert "Next: `make stage" in out
        parts = re.split(r"^m\d [a-z ]+$", out, flags=re.M)
        return parts[-2], parts[-1]


def bars(text: str) -> list[int]:
    return [len(bar) for bar in re.findall("█+", text)]


def test_m0_computes_every_position_again_and_m1_only_the_new_one(shown: Shown) -> None:
    before, own = shown("m1")
    assert f"{sum(range(16, 112)):,} positions computed for 96 tokens" in before
    assert "111 positions computed for 96 tokens" in own
    times = own.splitlines()[-4] + own.splitlines()[-5]
    equal = re.search(r"Time: m0 \d+ ms, m1 \d+ ms\. Within 5 %", times)  # what is said where two short runs are alike
    assert "m1: " in times or equal
    kept = [float(size) for size in re.findall(r"KV +([\d.]+) KB", own)]
    assert kept == sorted(kept) and kept[0] > 0
    assert re.findall(r"computes +(\d+)", before)[-1] == "111"
    assert len(bars(before)) == len(bars(own)) == 8


def test_m0_has_no_stage_before_it(shown: Shown) -> None:
    assert "m0: 6,096 positions" in shown("m0")[1]


def test_m2_shows_every_token_where_it_was_made(shown: Shown) -> None:
    before, own = shown("m2")
    made = {"A": 40, "B": 6, "C": 10, "D": 6, "E": 28, "F": 8, "G": 6, "H": 12}
    rows = dict(re.findall(r"^  ([A-H]) (.+?) *$", own, flags=re.M))
    counts = {id: Counter(row) for id, row in rows.items()}
    assert {id: count["P"] + count["d"] for id, count in counts.items()} == made
    assert max(map(len, rows.values())) == int(re.findall(r"(\d+) steps; 0%", own)[0])
    static = dict(re.findall(r"^  ([A-H]) (.+?) *$", before, flags=re.M))
    assert "-" in static["B"] and "-" not in "".join(rows.values())
    assert {len(static[id]) for id in "ABCD"} == {40}, "each waits for the longest of its batch"
    assert "68 steps" in before


def test_m3_gives_blocks_to_those_who_need_them_and_takes_them_back(shown: Shown) -> None:
    before, own = shown("m3")
    assert re.search(r"step   0 AAaaaaaaBBBbbbbb 2 run", before)
    assert "2 requests at most at once" in before
    strips = re.findall(r"step +\d+ (\S{16}) (\d) run", own)
    assert strips[0] == ("AABBBCDDE·······", "5")
    for strip, running in strips:
        assert len(set(strip) - {"·"}) == int(running)
    tables = dict(re.findall(r"block table of (.): ([\d ]+)", own))
    held = [block for table in tables.values() for block in table.split()]
    assert tables["A"].startswith("0 1") and len(held) == len(set(held)) > 8
    assert "5 requests at most at once" in own


def test_m4_walks_to_the_engines_own_output(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    before, own = shown("m4")
    assert float(re.findall(r"output, to ([\d.e+-]+)", own)[0]) < 1e-5
    lengths = [int(length) for length in re.findall(r"(\d+) tokens, ", own)]
    assert lengths == [127, 255, 511]
    assert len(re.findall(r"tokens, +[\d.]+ [KM]B scores, held +[\d.]+ [KM]B", before)) == 3
    assert own.count("tokens, no score matrix, held ") == 3, "m4 writes no scores"
    assert re.search(r"Most memory that a step took: m3 .* m4 ", own) and re.search(r"Time: m3 .* m4 ", own)
    assert "block" not in before.split("m3: the step")[0]
    walk = scenes._walk  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(scenes, "_walk", lambda view, q, k, v, out: walk(view, q, k, v, out * 1.5))
    _, wrong = shown("m4")
    assert float(re.findall(r"output, to ([\d.e+-]+)", wrong)[0]) > 0.1


def test_m4_and_m3_are_compared_by_the_largest_of_their_peaks(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([3e6, 8e6, 5e6, 0.0, 1e6, 4e6, 2e6, 0.0])  # a step of each prompt, and the end

    class Peak(ActivationPeak):
        def __exit__(self, *_: object) -> None:
            self.bytes = int(next(peaks))

    monkeypatch.setattr(scenes, "ActivationPeak", Peak)
    assert "Most memory that a step took: m3 8 MB, m4 4 MB. m4: 0.5 times m3's." in shown("m4")[1]


def test_m5_reads_the_prompt_in_pieces_next_to_the_decodes(shown: Shown) -> None:
    before, own = shown("m5")
    assert re.findall(r"C reads (\d+)", before) == ["500"]
    assert "+1" not in re.findall(r"(.*)C reads", before)[0]
    pieces = [int(piece) for piece in re.findall(r"A \+1  B \+1  C reads (\d+)", own)]
    assert len(pieces) > 2 and sum(pieces) == 500
    assert re.search(r"Longest pause: m4 .* m5 ", own)


def test_m5_says_the_longest_wait_of_both_that_decode(shown: Shown) -> None:
    waits = {"A": [0.01, 0.2, 0.03], "B": [0.01, 0.3, 0.03], "C": [0.9]}
    outputs = {id: SimpleNamespace(itl=itl, ttft=0.5) for id, itl in waits.items()}
    view: Any = SimpleNamespace(steps=lambda: iter(()), outputs=outputs)
    assert "A and B wait 300 ms at most" in scenes.per_step(view)


def test_an_engine_is_warmed_up_at_the_length_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold first prompt once decided between m3 and m4."""
    lengths: list[int] = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda e, p, *a, **k: lengths.append(len(p[0])) or generate(e, p, *a, **k))
    folder = stages.resolve("m4")
    demo(ROOT / "stages" / folder, importlib.import_module(f"stages.{folder}.engine").build, TINY)
    assert lengths == [510, 510]


def test_a_figure_that_got_worse_is_not_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    styles: dict[str, str] = {}
    monkeypatch.setattr(Console, "print", lambda _, text="", style="", **__: styles.update({str(text).strip(): style}))
    for first, style in ((2.0, "bold"), (0.5, "")):
        times = iter([first, 1.0])
        monkeypatch.setattr(View, "figures", lambda _, times=times: {"time": next(times)})
        folder = stages.resolve("m1")
        demo(ROOT / "stages" / folder, importlib.import_module(f"stages.{folder}.engine").build, TINY)
        assert [value for text, value in styles.items() if text.startswith("Time: ")] == [style]
        styles.clear()


def test_a_stage_without_a_readme_has_a_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step of CONTRIBUTING: `__init__.py`, `engine.py` and `__main__.py`, no more."""
    folder, source = tmp_path / "m8_shortest_first", ROOT / "stages" / stages.resolve("m6")
    folder.mkdir()
    for name in ("__init__.py", "engine.py", "__main__.py"):
        (folder / name).write_text((source / name).read_text())
    demo(folder, importlib.import_module("stages.m6_prefix_caching.engine").build, TINY)
    out = capsys.readouterr().out
    assert out.startswith("m8 shortest first\n") and "make stage8 diff" in out


def test_m6_finds_the_beginning_and_shares_its_blocks(shown: Shown) -> None:
    before, own = shown("m6")
    assert re.findall(r": +(\d+) of", before) == ["0", "0", "0"]
    assert re.findall(r": +(\d+) of", own) == ["0", "480", "480"]
    assert "2" * 30 + "▒" in own and "B and C shared 30 blocks" in own
    assert f"{2 * 480 / 1500:.0%} of the prompt tokens" in own


def test_m7_reads_fewer_bytes_for_a_token(shown: Shown) -> None:
    before, own = shown("m7", replace(TINY, dtype="bf16"))
    sizes = [dict(re.findall(r"token: (\w+) +([\d.]+ .B)", text)) for text in (before, own)]
    expected: list[dict[str, str]] = []
    totals: list[int] = []
    for stage in ("m6", "m7"):
        with stages.build(stage, model=TINY.model, device="cpu", dtype="bf16") as engine:
            model = engine.runner.model
            layers = sum(layer.weights_bytes() for layer in model.layers)
            totals.append(layers + model.head.weights_bytes())
            expected.append({"layers": scenes.size(layers), "head": scenes.size(model.head.weights_bytes())})
    assert sizes == expected
    for text, parts in zip((before, own), totals, strict=True):
        assert f"{scenes.size(parts)} for every token" in text


def test_a_model_that_does_not_exist_is_refused_before_anything_is_shown(
    shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="nowhere"):
        shown("m1", replace(TINY, model="./nowhere"))
    assert capsys.readouterr().out == ""


def test_in_a_terminal_it_is_live_and_ctrl_c_ends_it_with_one_line() -> None:
    terminal = Terminal("demo", *TINY_OPTIONS)
    terminal.wait_for("token  24")
    assert terminal.process.poll() is None, "its lines come while it runs"
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("interrupted")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.all
    assert "token  96" not in terminal.all
