"""The processes that rank 0 has started: each is heard from once in a while, until it ends."""

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

BEAT = 0.5  # seconds between two signs of life
SILENCE = 10.0  # seconds after which a process without one counts as lost
STARTING = 120.0  # the same until the first one: PyTorch is imported


class Watch:
    """A thread that reads what they write to their standard output: dots, and, after a `!`, what ended them. When one is
    lost all are killed: what rank 0 waits for then fails at once."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.lost: str | None = None  # in one line
        self._processes = processes
        self._due = [time.monotonic() + STARTING] * len(processes)  # by when each must be heard
        self._said = [b""] * len(processes)
        self._over, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def wait_for_news(self) -> None:
        """After a failure: does a process turn out to be lost?"""
        self._news.wait(2 * BEAT)

    def close(self, kill: bool) -> None:
        self._over.set()
        deadline = time.monotonic() + (0.0 if kill else 5.0)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe and pipe.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, index)
            while not self._over.is_set() and self.lost is None:
                ended = [key.data for key, _ in selector.select(BEAT / 5) if not self._hear(key.fd, key.data)]
                silent = [index for index, due in enumerate(self._due) if time.monotonic() > due]
                if (ended or silent) and not self._over.is_set():
                    self._end(ended, silent)

    def _hear(self, pipe: int, index: int) -> bool:
        data = os.read(pipe, 4096)
        self._said[index] += data.lstrip(b".")
        self._due[index] = time.monotonic() + SILENCE
        return bool(data)

    def _end(self, ended: Sequence[int], silent: Sequence[int]) -> None:
        """What killed one also ends others, which only say that they have lost it: the first cause counts."""
        for index in ended:
            with suppress(subprocess.TimeoutExpired):
                self._processes[index].wait(BEAT)
        said = [text.partition(b"!")[2].decode().strip() for text in self._said]
        codes = [process.poll() for process in self._processes]
        killed = [f"rank {i + 1} died ({signal.Signals(-c).name})" for i, c in enumerate(codes) if c is not None and c < 0]
        words = [f"rank {index + 1}: {text}" for index, text in enumerate(said) if text]
        left = [f"rank {index + 1} ended with status {code}" for index, code in enumerate(codes) if code is not None]
        quiet = [f"rank {index + 1} does not answer" for index in silent]
        causes = [*killed, *words, *quiet, *left, "a rank ended"]
        self.lost = causes[0] if words and causes[0] in words else f"{causes[0]}: the engine has ended, build a new one"
        for process in self._processes:
            process.kill()
        self._news.set()
