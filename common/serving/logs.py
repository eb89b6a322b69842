"""The server's log: one JSON object a line, on standard error, written by a thread of its own."""

import datetime
import json
import logging
import os
import queue
import sys
import threading
import time

LINES = 10_000  # that may wait for a reader; later ones are lost
log = logging.getLogger("folovllm.serving")
LAST_LINES = 1.0  # seconds that the end of the server waits for their reader


class JsonLines(logging.Formatter):
    """Message and level, and what `extra={"fields": {...}}` holds, such as the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Writer(logging.Handler):
    """Neither a pipe that nobody reads nor a full disk stops who logs: lines are lost then, and counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes] = queue.Queue(LINES)
        self._left_out = self._failed = self._reported = 0  # each is one thread's own
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record).encode(errors="replace") + b"\n")
        except Exception:  # full, or a message that does not fit its arguments
            self._left_out += 1

    def flushed(self) -> bool:
        """Wait for what is there to be written, but not for long."""
        end = time.monotonic() + LAST_LINES
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)
        return not self._lines.unfinished_tasks

    def _write_all(self) -> None:
        torn = b""
        while True:
            line = self._lines.get()
            lost = self._left_out + self._failed - self._reported
            if lost:
                note = {"msg": "log lines left out", "levelname": "WARNING", "fields": {"lines": lost}}
                line = self.format(logging.makeLogRecord(note)).encode() + b"\n" + line
            rest = torn + line
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                torn = b""
                self._reported += lost
            except OSError:
                self._failed += 1
                torn = b"\n" if len(rest) < len(torn + line) else torn
            self._lines.task_done()


def set_up() -> Writer:
    """For our log, and for what libraries and Python itself have to say; one line for each request is ours."""
    writer = Writer(sys.stderr.fileno())
    logging.root.handlers = [writer]
    logging.root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of each request that is not HTTP
    logging.captureWarnings(True)
    sys.unraisablehook = threading.excepthook = lambda args: log.error("uncaught", exc_info=args[:3])  # type: ignore
    return writer


def say(text: str) -> None:
    """On standard output, if there is one."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else Python tries again at its end)
