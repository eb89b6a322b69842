"""One quick comparison that many tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.m7_gptq.quantize import quantize
from stages.m7_gptq.settings import Settings
from tests.helpers import freeze

ROOT = Path(__file__).resolve().parents[2]
Bench = Callable[..., "subprocess.CompletedProcess[str]"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "benchmarks"]
TINY = ["--quick", "--model", "random:tiny-llama", "--dtype", "fp32", "--device", "cpu"]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=120)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """m0 and m1 on mixed and single, with the sweep of single."""
    folder = tmp_path_factory.mktemp("bench")
    done = run_bench(
        "compare", "--stages", "m0,m1", "--workload", "mixed,single", "--repeats", "2", "--sweep",
        "--json", str(folder / "bench.json"), *TINY,
    )  # fmt: skip
    return done, folder


@pytest.fixture(scope="session")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """m0 and m1, with a KV budget in which no request fits: m1 must fail, m0 needs none."""
    folder = tmp_path_factory.mktemp("failing")
    done = run_bench(
        "compare", "--stages", "m1,m0", "--repeats", "1", "--engine", "kv_cache_memory=1000",
        "--json", str(folder / "bench.json"), *TINY,
    )  # fmt: skip
    return done, folder


@pytest.fixture(scope="session")
def quantised_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPTQ checkpoint."""
    folder = tmp_path_factory.mktemp("gptq")
    settings = Settings(group_size=32, symmetric=True, method="rtn")
    return quantize(freeze("random:tiny-qwen3", folder / "plain"), settings, folder / "made", progress=False).folder
