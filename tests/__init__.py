"""Tests of everything. They run side by side, in as many processes as there are CPUs, so each has one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the programs that tests start

import common  # noqa: F401 - before torch is imported: it bounds how long idle threads spin
