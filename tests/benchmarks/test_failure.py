"""A reader of the table learns what went wrong: above all, that memory ran out, and for how much there was no room."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from benchmarks.failure import of_error, of_exit
from common.errors import UserError

CUDA = (
    "CUDA out of memory. Tried to allocate 34.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 9 GiB is free."
)


def test_memory_that_torch_refuses_on_a_cpu_is_reported_with_its_size() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert of_error(caught.value) == "out of memory: there was no room for 1,152,921,504.6 GB more"


def test_memory_that_numpy_refuses_is_reported_with_its_size() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, dtype=np.uint8)
    assert of_error(caught.value).startswith("out of memory: Unable to allocate 1.00 EiB")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError(CUDA), "out of memory: there was no room for 34.00 GiB more"),
        (MemoryError(), "out of memory: the system had no more to give"),
        (RuntimeError("CUDA error:\n  out of memory"), "out of memory: CUDA error: out of memory"),
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
        (UserError("raise kv_cache_memory"), "raise kv_cache_memory"),
        (KeyError("out of memory"), "KeyError: 'out of memory'"),
    ],
)
def test_an_error_in_one_line(error: Exception, says: str) -> None:
    assert of_error(error) == says


@pytest.mark.parametrize(
    ("status", "log", "says"),
    [
        (-signal.SIGKILL, "", "the system killed the worker: most likely out of memory"),
        (-signal.SIGSEGV, "one\ntwo\n", "the worker was killed by SIGSEGV; its last words: two"),
        (-99, "", "the worker was killed by signal 99"),
        (1, "", "the worker ended with status 1 and no result"),
    ],
)
def test_an_end_without_a_result_says_how_the_worker_ended(status: int, log: str, says: str) -> None:
    assert of_exit(status, log) == says
