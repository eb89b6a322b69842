"""Engines next to busy processes: what is measured, what is asked of it, and what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.files import read_json
from common import Engine
from common.cli.app import run_app
from tests.benchmarks.test_kept_pictures import assert_same
from tests.busy import measure as busy
from tests.busy import worker
from tests.busy.measure import LIBRARYS, LOADS, OURS, STAGES, Setting, app, busy_loops, measure, verdicts


class Fake:
    """Half as fast among busy processes with our setting, a tenth with the library's; the machine is its own clock."""

    loops = 0

    def __init__(self, stage: str, setting: Setting, model: str) -> None:
        self.stage, self.setting = stage, setting

    def rate(self, seconds: float) -> float:
        return 400.0 if not Fake.loops else 200.0 if self.setting == OURS else 40.0

    def close(self) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def loops(count: int):  # type: ignore[no-untyped-def]
        Fake.loops = count
        yield

    monkeypatch.setattr(busy, "Contestant", Fake)
    monkeypatch.setattr(busy, "busy_loops", loops)


@pytest.mark.usefixtures("fake")
def test_every_setting_is_measured_beside_every_load_in_every_round() -> None:
    runs = measure([OURS, LIBRARYS], 3, "model")
    assert len(runs) == len(STAGES) * 2 * len(LOADS)
    for (stage, load, setting), rates in runs.items():
        assert rates == [Fake(stage, setting, "").rate(1) if load else 400.0] * 3


@pytest.mark.parametrize(("quiet", "two", "met"), [(400, 168, True), (400, 160, False), (370, 168, False)])
def test_shares_are_of_the_librarys_speed_when_quiet_and_of_the_own_speed_beside_others(
    quiet: float, two: float, met: bool
) -> None:
    rates = {(OURS, 0): quiet, (OURS, 2): two, (OURS, 8): 60.0, (LIBRARYS, 0): 400.0}
    runs = {(stage, load, setting): [rate, 1e9, 0.0] for stage in STAGES for (setting, load), rate in rates.items()}
    found = verdicts(runs)
    assert len(found) == 3 * len(STAGES) and all(verdict["met"] for verdict in found) == met


@pytest.mark.usefixtures("fake")
def test_the_command_writes_results_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_app(app, ["--sweep", "--rounds", "1", "--json", str(tmp_path / "busy.json")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "busy.json").read_text())
    assert {record["setting"] for record in found["records"]} == {*map(str, busy.SWEEP), str(LIBRARYS), str(OURS)}
    assert all(record["tokens_per_s"] == record["runs"][0] for record in found["records"])
    assert (tmp_path / "busy.png").stat().st_size > 10_000
    assert "m6 next to 8 busy loops, of its quiet speed: 0.50 (asked 0.12) met" in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_a_share_that_is_not_reached_is_said_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "BUSY_SHARES", {2: 0.6})
    with pytest.raises(SystemExit) as end:
        run_app(app, ["--rounds", "1", "--json", str(tmp_path / "busy.json")])
    assert end.value.code == 1
    assert "NOT MET" in capsys.readouterr().out


def test_busy_loops_run_as_long_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def popen(command: list[str]) -> subprocess.Popen[bytes]:
        assert command[0] == sys.executable
        started.append(start(command))
        return started[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", popen)
    with busy_loops(2):
        assert len(started) == 2 and all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)


def test_a_run_counts_its_tokens_is_cut_short_and_leaves_nothing(build: Callable[..., Engine]) -> None:
    engine = build("m3", max_num_seqs=worker.REQUESTS)
    assert worker.rate(engine, 60.0) > 0
    assert engine.metrics()["output_tokens"] == worker.REQUESTS * worker.TOKENS
    assert worker.rate(engine, 0.0) > 0
    assert engine.metrics()["aborted"] == worker.REQUESTS
    assert not engine.has_unfinished and engine.metrics()["kv_used_bytes"] == 0


@pytest.mark.parametrize("path", sorted(ROOT.glob("reports/*/busy.json")), ids=lambda path: path.parent.name)
def test_a_kept_picture_is_what_is_drawn_of_its_results(path: Path, tmp_path: Path) -> None:
    assert_same(path.with_name("busy.png"), busy.draw(read_json(path), tmp_path))
