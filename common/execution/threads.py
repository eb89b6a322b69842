"""How many threads the CPU libraries start, and how long an idle one spins. Importing this module sets both, and
`common` imports it before anything else.

An OpenMP thread that is out of work spins on its core for a while and then sleeps. Spinning is right while the core is
free: the next operator comes sooner than a sleeping thread wakes. It is wrong where another process wants the core.
`SPIN_COUNT` bounds it to about a millisecond, and `common.execution.cores` takes fewer threads where others want the
CPUs; `make busy` measures both.

libgomp (PyTorch's on Linux), libomp and Intel's runtime read these variables when they are loaded, so a program that
imports torch before this package keeps their defaults. On Linux, PyTorch's operators and Numba's kernels share one
pool: Numba's OpenMP layer binds to the libgomp that PyTorch has loaded. Where it cannot, Numba's own pool sleeps.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

SPIN_COUNT = 100_000  # turns of libgomp's waiting loop before a thread sleeps; its own default is 300,000

LIBRARY_DEFAULTS = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What the runtimes do without us, written out: for peers in benchmarks, which run as their users run them."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounded spinning, and as many threads as this process has CPUs; a variable that the user has set stays."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        environment.setdefault("KMP_BLOCKTIME", "1")  # libomp and Intel's, in milliseconds
    environment.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    threads = environment["OMP_NUM_THREADS"].split(",")[0].strip()  # one number for each nesting level
    if threads.isdecimal() and int(threads) > 0:
        environment.setdefault("NUMBA_NUM_THREADS", threads)  # Numba's first kernel sets the number for both


def without_bounds(environment: Mapping[str, str]) -> dict[str, str]:
    """The same environment for a program that is not ours: spinning as the runtimes have it, unless the user set it."""
    ours = {"GOMP_SPINCOUNT": str(SPIN_COUNT), "KMP_BLOCKTIME": "1"}
    return {name: LIBRARY_DEFAULTS[name] if ours.get(name) == value else value for name, value in environment.items()}


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the whole CPUs of its cgroups' quota; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, cgroup_quota())))


def cgroup_quota(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """CPUs' worth of time that the tightest cgroup above this process allows; infinite without a limit.

    cgroup v2 has `cpu.max` ("max 100000" or "150000 100000"), v1 `cpu.cfs_quota_us` (-1: none) and `cpu.cfs_period_us`.
    """
    limits = [float("inf")]
    for line in _lines(own):  # "0::/user.slice" (v2), "4:cpu,cpuacct:/docker/..." (v1)
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops = [root / "cpu", root / controllers] if controllers else [root, root / "unified"]
        for top in tops:
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                limits += _limits_of(folder)
                if folder == top:
                    break
    return min(limits)


def _limits_of(folder: Path) -> list[float]:
    words = [word for line in _lines(folder / "cpu.max") for word in line.split()]
    if not words:
        words = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return []
    return [int(words[0]) / int(words[1])]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1] if path.exists() else []
    except (OSError, UnicodeDecodeError):
        return []


set_defaults()
