"""Starts a worker, follows its progress, and makes sure that it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.execution import PLAIN
from benchmarks.failure import of_exit
from benchmarks.files import read_record
from benchmarks.peers import PEERS
from benchmarks.record import Record
from benchmarks.worker import MARK, Job
from common.execution.threads import without_bounds

OnMessage = Callable[[dict[str, Any]], None]


def run_worker(job: Job, on_message: OnMessage, timeout: float | None = None) -> Record:
    """The record of a job, whatever happens to the worker: a crash or a timeout gives a failed record."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = Path(folder) / "record.json"
        log = Path(folder) / "stderr.txt"
        told = replace(job, result_path=str(result))
        with log.open("wb") as errors:
            timed_out, status = _follow(told, errors, on_message, timeout)
        if result.exists():
            return read_record(result)
        said = log.read_text(errors="replace")
        reason = f"no result after {timeout:g} s (--timeout)" if timed_out else of_exit(status, said)
    record = Record.failed(job.stage, job.workload, reason, job.variant)
    record.note, record.plain = job.note, job.execution == PLAIN
    return record


def _follow(job: Job, errors: Any, on_message: OnMessage, timeout: float | None) -> tuple[bool, int]:
    """Run the worker to its end. Was it stopped because its time was up, and its exit status."""
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
    assert worker.stdin is not None
    assert worker.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _kill(worker)

    timer = threading.Timer(timeout, expire) if timeout else None
    try:
        if timer:
            timer.start()
        worker.stdin.write(job.to_line())
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith(MARK):
                on_message(json.loads(line[len(MARK) :]))
        worker.wait()
    except BrokenPipeError:  # it died before it read its job; its log says why
        worker.wait()
    finally:
        if timer:
            timer.cancel()
        _kill(worker)
    return expired.is_set(), worker.returncode


def _kill(worker: subprocess.Popen[str]) -> None:
    """End the worker and whatever it started."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):
        worker.kill()
    if worker.poll() is None:
        worker.wait()
