"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stages
from common import Engine
from common.config import DEFAULT_MODEL
from common.execution.threads import usable_cpus
from common.models import load_tokenizer
from common.text.tokenizer import Tokenizer
from tests.coverage import pytest_sessionfinish, pytest_testnodedown  # noqa: F401 - hooks
from tests.summary import pytest_terminal_summary  # noqa: F401 - a hook


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """By affinity and quota; xdist itself would count cores."""
    return usable_cpus()


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test module defines or imports a kernel

TINY = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3")


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_reaches_children() -> None:
    """A shell starts background jobs with SIGINT ignored, and processes inherit that: undo it, for the tests that
    interrupt a program."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Tiny models run faster on one thread, and two test runs on one machine do not disturb each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The embedded model's tokenizer: byte-level BPE, as most models have."""
    loaded = load_tokenizer(DEFAULT_MODEL)
    assert loaded is not None
    return loaded


@pytest.fixture
def build() -> Iterator[Callable[..., Engine]]:
    """`stages.build`, on a tiny model in float32 on the CPU unless told otherwise; closes what it built."""
    engines: list[Engine] = []

    def make(stage: str = "m1", **options: Any) -> Engine:
        engines.append(stages.build(stage, **({"model": TINY[0], "device": "cpu"} | options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
