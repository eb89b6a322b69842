"""Starts a worker, follows its progress, and makes sure that it ends."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.failure import of_exit
from benchmarks.peers import PEERS
from benchmarks.record import Record
from benchmarks.worker import MARK, Job
from common.execution.threads import without_bounds

OnMessage = Callable[[dict[str, Any]], None]


def run_worker(job: Job, on_message: OnMessage, timeout: float | None = None) -> Record:
    """The record of a job; a failed one where the worker crashes or takes too long."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = Path(folder) / "record.json"
        log = Path(folder) / "stderr.txt"
        told = replace(job, result_path=str(result))
        with log.open("wb") as errors:
            timed_out, status = _follow(told, errors, on_message, timeout)
        if result.exists():
            return Record(**json.loads(result.read_text(encoding="utf-8")))
        said = log.read_text(errors="replace")
        return job.failed(f"no result after {timeout:g} s (--timeout)" if timed_out else of_exit(status, said))


def _follow(job: Job, errors: Any, on_message: OnMessage, timeout: float | None) -> tuple[bool, int]:
    """Run the worker to its end: was its time up, and its exit status."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = without_bounds(os.environ) if job.stage in PEERS else dict(os.environ)
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**environment, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C reaches us alone, and we end the worker
    )
    assert worker.stdin is not None and worker.stdout is not None
    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, _kill, (worker,))
    began = time.monotonic()
    try:
        timer.start()
        worker.stdin.write(json.dumps(asdict(job)) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith(MARK):
                on_message(json.loads(line[len(MARK) :]))
        worker.wait()
    except BrokenPipeError:  # it died before it read its job; its log says why
        worker.wait()
    finally:
        timer.cancel()
        _kill(worker)
    return timeout is not None and time.monotonic() - began >= timeout, worker.returncode


def _kill(worker: subprocess.Popen[str]) -> None:
    """End the worker and the processes that it started."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):
        worker.kill()
    worker.wait()
