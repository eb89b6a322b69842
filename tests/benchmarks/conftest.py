"""Quick comparisons, their jobs in workers or, which is ten times faster, in this process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import process, worker
from benchmarks.__main__ import app
from benchmarks.process import OnMessage
from benchmarks.worker import Job
from common.cli import run_app
from stages.m7_gptq.checkpoint.baselines import RTN
from stages.m7_gptq.checkpoint.quantize import quantize
from tests.helpers import freeze

ROOT = Path(__file__).resolve().parents[2]
Done = tuple["subprocess.CompletedProcess[str]", Path]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "benchmarks"]
TINY = ["--quick", "--model", "random:tiny-llama", "--dtype", "fp32", "--device", "cpu"]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=120)


def follow_here(job: Job, errors: Any, on_message: OnMessage, timeout: float | None) -> tuple[bool, int]:
    """What a worker does, from the line that it reads to the file that it writes, without its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(job)) + "\n"))
        patch.setattr(worker, "tell", lambda **message: on_message(message))
        for ends_the_process in ("end_with_parent", "die_first"):
            patch.setattr(worker, ends_the_process, lambda: None)
        patch.setattr(os, "_exit", lambda status: None)
        worker.main()
    return False, 0


def bench_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`run_bench` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(process, "_follow", follow_here)
        with pytest.raises(SystemExit) as ended:
            run_app(app, arguments)
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """m0 and m1 on mixed and single, with the sweep of single."""
    folder = tmp_path_factory.mktemp("bench")
    done = bench_here(
        "compare", "--stages", "m0,m1", "--workload", "mixed,single", "--repeats", "2", "--sweep",
        "--json", str(folder / "bench.json"), *TINY,
    )  # fmt: skip
    return done, folder


@pytest.fixture(scope="session")
def quantised_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPTQ checkpoint."""
    folder = tmp_path_factory.mktemp("gptq")
    settings = RTN(group_size=32, symmetric=True)
    return quantize(freeze("random:tiny-qwen3", folder / "plain"), settings, folder / "made", progress=False).folder
