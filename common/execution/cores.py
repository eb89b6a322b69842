"""As many threads as other programs leave CPUs.

The threads of one operator wait for the slowest, which is the one whose core another program uses too: fewer threads,
each on a core of its own, are faster (reports/cpu-avx2/busy.json). So between steps the engine looks up how much CPU
time other programs took (proc_stat(5)), and takes the rest. The number of threads may change the last bit of a sum.
OMP_DYNAMIC=false keeps the number, and so does an OMP_NUM_THREADS below what this process may use.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from common.execution.threads import usable_cpus

T = TypeVar("T")

INTERVAL = 0.1  # seconds between two looks: the kernel counts in hundredths of a second
STALE = 3.0  # seconds after which the last look is too old: the engine had nothing to do

CPU_TIMES = Path("/proc/stat")


class SharedCores:
    """Follows the load of the machine for one engine. The number of threads is a property of the thread that starts
    them, so the thread that runs the steps calls `follow`, before every one."""

    _chosen = (0, 0)  # what an engine of this process set last, and of how many threads at most

    def __init__(self, cpu_times: Path = CPU_TIMES) -> None:
        self._cpu_times = cpu_times
        self._set = torch.get_num_threads()
        chosen, most = SharedCores._chosen
        self._most = most if self._set == chosen else self._set  # not what an engine has just lowered it to
        kept = os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("false", "0")
        self._follows = not kept and self._most > 1 and usable_cpus() <= self._most
        self._looked = -STALE
        self._idle = self._own = 0.0

    def follow(self) -> None:
        """Look, if it is time to, and set PyTorch's and Numba's threads to the CPUs that others leave."""
        now = time.perf_counter()
        if not self._follows or now - self._looked < INTERVAL:
            return
        before, self._looked = (self._looked, self._idle, self._own), now
        idle = idle_seconds(self._cpu_times)
        if idle is None:
            self._follows = False
            return
        (cpus, self._idle), self._own = idle, time.process_time()
        threads = torch.get_num_threads()
        if threads not in (self._set, SharedCores._chosen[0]):  # set by other code: that is the most now
            self._most = threads
        self._set = threads
        seconds = now - before[0]
        if seconds < STALE:
            others = cpus - (self._idle - before[1] + self._own - before[2]) / seconds
            self._use(min(self._most, max(1, int(cpus - others + 0.5))))

    def _use(self, threads: int) -> None:
        if threads != self._set:
            use_threads(threads)
            self._set = threads
            SharedCores._chosen = threads, self._most


def idle_seconds(path: Path = CPU_TIMES) -> tuple[int, float] | None:
    """How many CPUs this process may run on, and how long these were idle since the machine started; None where the
    system does not tell."""
    try:
        lines = path.read_text().splitlines()
        allowed, tick = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK")
    except (OSError, UnicodeDecodeError, AttributeError, ValueError):
        return None
    idle = found = 0
    for line in lines:
        name, *times = line.split()[:6]  # cpu3 user nice system idle iowait
        if name[3:].isdecimal() and name.startswith("cpu") and int(name[3:]) in allowed and len(times) == 5:
            idle += int(times[3]) + int(times[4])
            found += 1
    return (found, idle / tick) if found else None


def use_threads(count: int) -> None:
    """PyTorch's threads and those of Numba's kernels, of the calling thread."""
    if "numba" in sys.modules:
        import numba

        most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        numba.set_num_threads(min(count, most))  # the first time, it sets PyTorch's to `most`
    torch.set_num_threads(count)


def in_own_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a thread that ends with it, and with the thread its OpenMP threads.

    Each thread that calls operators has OpenMP threads of its own. As long as there are more of them than CPUs, libgomp
    spins a thousand turns at most: an engine that one thread loads and another drives would sleep after each operator.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)  # daemon: Ctrl-C need not wait for it
    thread.start()
    found = result.result()
    thread.join()
    return found
