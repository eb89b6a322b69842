"""One side of a race, from outside: the process of a stage, and its events."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Event = dict[str, Any]
OnEvent = Callable[[Event], None]
LAST = ("prepared", "ended", "failed")  # the events after which a command is done


class Side:
    """`folder`: of the stage, such as `m1_kv_cache`; `arguments`: of its command line, such as `--model`, `...`.

    A process that has ended, or was ended while it loaded, is started again for the next race.
    """

    def __init__(self, folder: str, arguments: Sequence[str]) -> None:
        self.stage = folder.split("_")[0]
        self.title = f"{self.stage} {folder.partition('_')[2].replace('_', ' ')}"
        self.number = int(self.stage[1:])
        self._command = [sys.executable, "-m", f"stages.{folder}", "play", *arguments]
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by `close`
        self._loads = False
        self._start()

    def _start(self) -> None:
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which closes the sides
        )

    def do(self, command: Event) -> Iterator[Event]:
        """Send a command; its events as they come, the last one included. A process that has ended is a failure."""
        self._loads = command["do"] == "prepare"
        if self._loads and self._process.poll() is not None:
            self._close_input()
            self._start()
        self._send(command)
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            ended = not line.endswith("\n")  # a killed process may leave half a line
            event = {"event": "failed", "message": self._last_words()} if ended else json.loads(line)
            over = event["event"] in LAST
            self._loads = self._loads and not over
            yield event
            if over:
                return

    def stop(self) -> None:
        """End the current run; its `ended` event follows. Loading cannot be interrupted: its process is ended."""
        if self._loads:
            self._process.kill()
        self._send({"do": "stop"})

    def close(self) -> None:
        """End the process: it exits when its input closes, or is killed."""
        self._close_input()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _close_input(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _send(self, command: Event) -> None:
        with contextlib.suppress(OSError):  # it has ended: `do` finds out
            if self._process.stdin is not None:
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].removeprefix("error: ") if lines else f"exit status {self._process.returncode}"
        return f"its process has ended: {said}"
