"""Tests of everything. They run side by side, in as many processes as there are CPUs, so each has one thread."""

import os

from tests import coverage

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the programs that tests start
coverage.start()

import common  # noqa: E402, F401 - after the start of coverage, and before torch: it bounds how long idle threads spin
