"""As many threads as other programs leave CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import Engine
from common.cli import app as command
from common.cli import generate
from common.config import EngineConfig
from common.execution import cores
from common.execution.cores import INTERVAL, STALE, SharedCores, idle_seconds, in_own_thread
from common.execution.threads import usable_cpus
from common.serving.options import ServerOptions
from tests.busy.measure import busy_loops

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """A clock, the CPUs' times and a number of threads, in place of the real ones."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
        self.path, self.cpus, self.threads = path, cpus, cpus
        self._now = 1000.0
        self._own = self._idle = 50.0
        for name, function in (
            ("time.perf_counter", lambda: self._now),
            ("time.process_time", lambda: self._own),
            ("torch.get_num_threads", lambda: self.threads),
            ("use_threads", lambda count: setattr(self, "threads", count)),
            ("usable_cpus", lambda: cpus),
            ("os.sched_getaffinity", lambda process: set(range(cpus))),
        ):
            monkeypatch.setattr(f"common.execution.cores.{name}", function)
        monkeypatch.setattr(SharedCores, "_chosen", (0, 0))
        self.run(1.0)

    def run(self, seconds: float, own: float = 0.0, others: float = 0.0) -> None:
        """Let time pass, in which this process and all others take this many CPUs."""
        self._now += seconds
        self._own += own * seconds
        self._idle += max(0.0, self.cpus - own - others) * seconds
        share = round(self._idle * os.sysconf("SC_CLK_TCK") / self.cpus)
        lines = ["cpu 1 2 3 4 5", *(f"cpu{cpu} 70 0 20 {share - 7} 7 0 0" for cpu in range(self.cpus)), "intr 5 6"]
        self.path.write_text("\n".join(lines))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "stat", monkeypatch, 2)


def after(machine: Machine, shared: SharedCores, own: float, others: float, seconds: float = 0.5) -> int:
    machine.run(seconds, own, others)
    shared.follow()
    return machine.threads


def test_threads_are_the_cpus_that_others_leave(two: Machine) -> None:
    shared = SharedCores(two.path)
    shared.follow()
    assert after(two, shared, own=1.9, others=0.05) == 2
    assert after(two, shared, own=1.0, others=1.0) == 1  # next to two loops
    assert after(two, shared, own=0.7, others=1.3) == 1
    assert after(two, shared, own=0.2, others=1.8) == 1  # one remains, however little is left
    assert after(two, shared, own=1.0, others=0.1) == 2  # they have gone
    assert after(two, shared, own=1.2, others=0.0) == 2  # idle time of its own threads is not taken for others


@pytest.mark.parametrize(("others", "threads"), [(0.4, 16), (3.2, 13), (3.0, 13), (15.9, 1)])
def test_one_of_many_cpus_that_is_busy_costs_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: float, threads: int
) -> None:
    machine = Machine(tmp_path / "stat", monkeypatch, 16)
    shared = SharedCores(machine.path)
    shared.follow()
    assert after(machine, shared, own=min(12.0, 16 - others), others=others) == threads


def test_an_engine_built_beside_a_load_takes_all_threads_once_it_is_gone(two: Machine) -> None:
    first = SharedCores(two.path)
    first.follow()
    assert after(two, first, own=1.0, others=1.0) == 1
    second = SharedCores(two.path)
    second.follow()
    assert after(two, second, own=1.0, others=0.0) == 2
    assert after(two, first, own=1.0, others=0.0) == 2, "the first engine, too"


def test_between_two_looks_and_after_a_long_pause_the_number_stays(two: Machine) -> None:
    shared = SharedCores(two.path)
    shared.follow()
    assert after(two, shared, own=0.5, others=1.5, seconds=INTERVAL / 2) == 2
    assert after(two, shared, own=0.5, others=1.5, seconds=INTERVAL) == 1
    assert after(two, shared, own=0.0, others=0.0, seconds=STALE) == 1
    assert after(two, shared, own=1.0, others=0.0) == 2


def test_a_number_that_was_chosen_elsewhere_is_the_most(two: Machine) -> None:
    shared = SharedCores(two.path)
    shared.follow()
    two.threads = 1
    assert after(two, shared, own=1.0, others=0.0) == 1
    two.threads = 2
    assert after(two, shared, own=1.0, others=0.0) == 2


@pytest.mark.parametrize("case", ["OMP_DYNAMIC=false", "OMP_NUM_THREADS", "no CPU times", "one CPU"])
def test_the_number_stays_where_the_user_or_the_system_says_so(
    two: Machine, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    if case == "OMP_DYNAMIC=false":
        monkeypatch.setenv("OMP_DYNAMIC", "FALSE")
    elif case == "OMP_NUM_THREADS":
        monkeypatch.setattr(cores, "usable_cpus", lambda: 4)
    elif case == "one CPU":
        two.threads = 1
    shared = SharedCores(two.path if case != "no CPU times" else two.path.with_name("absent"))
    shared.follow()
    assert after(two, shared, own=0.5, others=1.5) == (1 if case == "one CPU" else 2)


def test_idle_time_is_that_of_the_cpus_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    path.write_text("cpu 9 9 9 900 9\ncpu0 1 2 3 500 20 7\ncpu1 1 2 3 4 5 7\ncpu3 1 1 1 60 20 7\nprocs 4\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3})
    assert idle_seconds(path) == (2, 600 / tick)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7})
    assert idle_seconds(path) is None
    path.write_bytes(b"cpu0 \xff\xfe")
    assert idle_seconds(path) is None


BESIDE_OTHERS = """
import time, common, torch
from common.execution.cores import SharedCores
shared, end = SharedCores(), time.perf_counter() + 30
while torch.get_num_threads() > 1 and time.perf_counter() < end:
    shared.follow()
    torch.ones(400, 400) @ torch.ones(400, 400)
print(torch.get_num_threads())
"""


@pytest.mark.skipif(usable_cpus() < 2, reason="needs two CPUs")
def test_beside_as_many_busy_processes_as_cpus_one_thread_is_left() -> None:
    """On the real machine, with the real counters."""
    environment = os.environ | {"OMP_NUM_THREADS": str(usable_cpus())}
    with busy_loops(2 * usable_cpus()):
        run = subprocess.run(
            [sys.executable, "-c", BESIDE_OTHERS], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert run.stdout == "1\n", run.stderr


THREADS_LEFT = """
import os, sys, time, common, torch
from common.execution.cores import in_own_thread
count = lambda: len(os.listdir("/proc/self/task"))
before, made = count(), []
def work():
    torch.ones(3_000_000).exp()
    made.append(count())
in_own_thread(work) if sys.argv[1] == "own" else work()
end = time.perf_counter() + (10 if sys.argv[1] == "own" else 0.2)
while count() > before and time.perf_counter() < end:  # a thread that ends is seen for a moment
    time.sleep(0.01)
print(made[0] > before + (sys.argv[1] == "own"), count() > before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize(("where", "left"), [("own", "False"), ("main", "True")])
def test_openmp_threads_end_with_the_thread_that_used_them(where: str, left: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", THREADS_LEFT, where],
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.split() == ["True", left], run.stderr


def test_what_fails_in_the_own_thread_is_raised_here() -> None:
    assert in_own_thread(lambda: threading.current_thread().name) == "loading"
    with pytest.raises(SystemExit, match="7"):
        in_own_thread(lambda: sys.exit(7))


def test_the_server_loads_in_a_thread_that_has_ended_when_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its engine's threads would sleep after every operator."""
    from common.serving import server

    seen: list[threading.Thread] = []

    @contextmanager
    def ready(build: object, config: EngineConfig) -> Generator[str]:
        seen.append(threading.current_thread())
        yield "engine"
        seen.append(threading.current_thread())

    def run(engine: object, *_: object) -> None:
        assert engine == "engine" and len(seen) == 1 and not seen[0].is_alive()

    monkeypatch.setattr(generate, "ready_engine", ready)
    monkeypatch.setattr(server, "run", run)
    command.serve(lambda config: pytest.fail("nothing is built"), EngineConfig(), ServerOptions(port=0))
    assert seen[1] is threading.main_thread()


def test_the_runner_asks_before_each_step_on_a_cpu(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SharedCores] = []
    monkeypatch.setattr(SharedCores, "follow", lambda cores: asked.append(cores))
    engine = build("m0")
    engine.add_request([1, 2, 3])
    for steps in range(1, 4):
        engine.step()
        assert len(asked) == steps
