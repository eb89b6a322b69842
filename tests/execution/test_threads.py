"""How many threads the CPU libraries start, and how long an idle one spins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.execution import threads
from common.execution.threads import LIBRARY_DEFAULTS, SPIN_COUNT, cgroup_quota, set_defaults, without_bounds

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")


def defaults_with(**given: str) -> dict[str, str]:
    set_defaults(given)
    return given


def test_spinning_is_bounded_unless_the_user_has_set_it() -> None:
    assert defaults_with()["GOMP_SPINCOUNT"] == str(SPIN_COUNT) and defaults_with()["KMP_BLOCKTIME"] == "1"
    assert defaults_with(GOMP_SPINCOUNT="7")["GOMP_SPINCOUNT"] == "7"
    policy = defaults_with(OMP_WAIT_POLICY="active")
    assert "GOMP_SPINCOUNT" not in policy and "KMP_BLOCKTIME" not in policy


@pytest.mark.parametrize(("given", "numba"), [("3", "3"), ("4,2", "4"), ("no number", None), ("0", None)])
def test_numbas_pool_is_as_large_as_the_users_openmp_pool(given: str, numba: str | None) -> None:
    """Numba's first kernel sets the number of threads for PyTorch, too."""
    found = defaults_with(OMP_NUM_THREADS=given)
    assert found["OMP_NUM_THREADS"] == given and found.get("NUMBA_NUM_THREADS") == numba
    assert defaults_with(OMP_NUM_THREADS=given, NUMBA_NUM_THREADS="1")["NUMBA_NUM_THREADS"] == "1"


def test_threads_are_the_cpus_of_the_affinity_within_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5, 6}, raising=False)
    for quota, cpus in ((float("inf"), 4), (2.9, 2), (64.0, 4), (0.3, 1)):
        monkeypatch.setattr(threads, "cgroup_quota", lambda quota=quota: quota)
        assert threads.usable_cpus() == cpus
        assert defaults_with()["OMP_NUM_THREADS"] == defaults_with()["NUMBA_NUM_THREADS"] == str(cpus)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.usable_cpus() == 1


GROUPS = {
    "no limit": ("0::/a/b\n", {"cpu.max": "max 100000\n"}, float("inf")),
    "its own": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
    "one above it is tighter": ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    "a container's own root": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "a path outside of the container": ("0::/../x\n", {"cpu.max": "300000 100000\n"}, 3.0),
    "version 1": (
        "5:memory:/a\n4:cpu,cpuacct:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "version 1 without a limit": (
        "4:cpu,cpuacct:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        float("inf"),
    ),
    "nonsense": ("nonsense\n\n0:\n", {"cpu.max": "a b\n"}, float("inf")),
    "a period of nothing": ("0::/\n", {"cpu.max": "100000 0\n"}, float("inf")),
}


@pytest.mark.parametrize(("own", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_quota_is_the_tightest_of_all_groups(own: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "cgroup").write_text(own)
    assert cgroup_quota(tmp_path / "fs", tmp_path / "cgroup") == expected
    assert cgroup_quota(tmp_path / "fs", tmp_path / "missing") == float("inf")


def test_a_peer_gets_what_its_runtime_does_by_itself() -> None:
    """Engines that are not ours must not be measured with our bounds; what the user has set is the user's."""
    ours = defaults_with(HOME="/home")
    assert without_bounds(ours) == ours | LIBRARY_DEFAULTS
    theirs = defaults_with(GOMP_SPINCOUNT="7", KMP_BLOCKTIME="8")
    assert without_bounds(theirs) == theirs


ONE_POOL = """
import os, stages, torch
def threads(): return len(os.listdir("/proc/self/task"))
a = torch.randn(800, 800); a @ a; torch.randn(10**6).add_(1)
before = threads()
from stages.m4_flash_attention.fast.backends import cpu
from tests.m4.cases import make_case
case = make_case([(1, 300), (1, 40)], head_dim=64)
case.check(cpu.create(case.shape))
import numba
print(numba.threading_layer(), threads() - before, torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's settings and /proc are Linux's")
def test_the_runtime_is_loaded_with_the_bounds_and_pytorch_and_numba_share_its_pool() -> None:
    """A pool of each would spin for the cores of the other."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", ONE_POOL], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr, done.stderr[-500:]
    layer, more, count = done.stdout.split()
    assert (layer, more, count) == ("omp", "0", "2"), "Numba has threads of its own"


@pytest.mark.parametrize("package", ["stages", "benchmarks", "notebooks", "tests"])
def test_every_package_imports_common_before_anything_that_loads_a_runtime(package: str) -> None:
    """`python -m PACKAGE...` runs its `__init__` first; `common` sets the bounds before its other imports."""
    light = {*sys.stdlib_module_names, "tests"}
    heavy = [top for line in imports_of(package) if (top := line.split()[1].split(".")[0]) not in light]
    assert heavy[0] == "common"
    assert imports_of("common")[0].startswith("from common.execution import threads")


def imports_of(package: str) -> list[str]:
    lines = (ROOT / package / "__init__.py").read_text().splitlines()
    return [line for line in lines if line.startswith(("from ", "import "))]
