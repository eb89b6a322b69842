"""Starts workers, follows their progress, and makes sure that they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.environment import ROOT
from benchmarks.failure import of_exit
from benchmarks.files import read_record
from benchmarks.record import Record
from benchmarks.worker import MARK, Job

OnMessage = Callable[[dict[str, Any]], None]


class Workers:
    """One job after the other, each in a process of its own. While one worker loads its model, the next one imports its
    libraries, which takes as long; while one is measured, no other does anything."""

    def __init__(self) -> None:
        self._next: _Worker | None = None

    def run(self, job: Job, on_message: OnMessage, timeout: float | None = None, *, more: bool = False) -> Record:
        """The record of a job, whatever happens to the worker: a crash or a timeout gives a failed record. more: there
        will be another job."""
        worker, self._next = self._next or _Worker(), None
        try:
            timed_out, status = self._follow(worker, job, on_message, timeout, more)
            if worker.result.exists():
                return read_record(worker.result)
            reason = f"no result after {timeout:g} s (--timeout)" if timed_out else of_exit(status, worker.said())
        finally:
            worker.end()
        record = Record.failed(job.stage, job.workload, reason, job.variant)
        record.note = job.note
        return record

    def _follow(
        self, worker: _Worker, job: Job, on_message: OnMessage, timeout: float | None, more: bool
    ) -> tuple[bool, int]:
        """Run the worker to its end. Was it stopped because its time was up, and its exit status."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            worker.kill()

        timer = threading.Timer(timeout, expire) if timeout else None
        try:
            if timer:
                timer.start()
            worker.say(replace(job, result_path=str(worker.result)).to_line())
            self._next = _Worker() if more else None
            for message in worker.messages():
                if "loaded" in message:
                    if self._next:
                        next(self._next.messages(), None)  # its first one: everything is imported
                    worker.say("go on\n")
                else:
                    on_message(message)
            status = worker.wait()
        except BrokenPipeError:  # it died before it read what it was told; its log says why
            status = worker.wait()
        finally:
            if timer:
                timer.cancel()
            worker.kill()
        return expired.is_set(), status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._next:
            self._next.end()


class _Worker:
    """A process that imports its libraries, then waits for its job."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.result = Path(self._folder.name) / "record.json"
        self._log = Path(self._folder.name) / "stderr.txt"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the worker
            )

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                yield json.loads(line[len(MARK) :])

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait()

    def kill(self) -> None:
        """End it, if it has not ended, and whatever it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, AttributeError):
            self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        self._folder.cleanup()
