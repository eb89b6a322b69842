"""Tests of everything. They run side by side, in as many processes as there are CPUs, so each has one thread."""

import os

from tests import coverage

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the programs that tests start
coverage.start()

# After the start of coverage, and before torch: it bounds how long idle threads spin.
from common.execution.cache import cache_root  # noqa: E402

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_root()))  # one, also where a test gives a program another cache
