"""The log: lines of JSON, whoever writes them, and a service that goes on when they cannot be written."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.serving import logs
from common.serving.logs import LINES, Writer
from tests.serving.running import ROOT, TINY, Process, wait_until

Start = Callable[..., Process]
PROMPT: dict[str, Any] = {"model": TINY, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}


def record(message: str, name: str = "folovllm.serving", **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, "", 0, message, (), None)
    made.fields = fields
    return made


def test_every_line_is_json_whoever_writes_it() -> None:
    script = """
import asyncio, logging, threading, warnings
from common.serving import logs
writer = logs.set_up()
logging.getLogger("folovllm.serving").info("ours", extra={"fields": {"n": 1}})
logging.getLogger("uvicorn.error").error("uvicorn's %d", 1)
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
class Bad:
    def __del__(self): raise ValueError("in __del__")
del (bad := Bad())
async def main():
    asyncio.get_running_loop().call_exception_handler({"message": "asyncio's"})
asyncio.run(main())
logging.getLogger("folovllm.serving").info("bad %d", "arguments")
logging.getLogger("folovllm.serving").info("\\ud800 \\n line")
assert writer.flushed()
"""
    script = script.replace("del (bad := Bad())", "bad = Bad(); del bad")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    lost = [line for line in lines if line["event"] == "log lines left out"]  # said when the writer comes to it
    assert [line["lines"] for line in lost] == [1]
    lines = [line for line in lines if line not in lost]
    events = [line["event"] for line in lines]
    assert events[:2] == ["ours", "uvicorn's 1"] and "a warning" in events[2]
    assert events[3:6] == ["uncaught", "uncaught", "asyncio's"], events
    assert "ZeroDivisionError" in lines[3]["traceback"] and "in __del__" in lines[4]["traceback"]
    assert events[6:] == ["\ud800 \n line"]


def test_a_pipe_that_nobody_reads_loses_lines_and_says_how_many() -> None:
    reader, writer_end = os.pipe()
    writer = Writer(writer_end)
    for number in range(LINES + 5000):
        writer.emit(record("line", number=number, more="x" * 100))
    assert not writer.flushed()
    text = b""
    while writer._lines.unfinished_tasks or select.select([reader], [], [], 0)[0]:
        if select.select([reader], [], [], 0.1)[0]:  # never a read that could wait: the writer may be done between
            text += os.read(reader, 1 << 20)
    writer.emit(record("line", number=0, last=True))
    assert writer.flushed()
    text += os.read(reader, 1 << 20)
    assert text.endswith(b'"number": 0, "last": true}\n')
    lines = [json.loads(line) for line in text.splitlines()]
    left_out = sum(line["lines"] for line in lines if line["event"] == "log lines left out")
    assert left_out > 3000
    assert len([line for line in lines if line["event"] == "line"]) + left_out == LINES + 5000 + 1
    os.close(reader)
    writer.emit(record("nobody is there"))
    assert writer.flushed(), "a closed pipe is no reason to wait, or to end"
    os.close(writer_end)


def test_a_full_disk_loses_lines_until_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = Writer(file.fileno())
        room, write = [10], os.write

        def scarce(descriptor: int, data: bytes) -> int:
            if room[0] <= 0:
                raise OSError(28, "No space left on device")
            written = write(descriptor, data[: room[0]])
            room[0] -= written
            return written

        monkeypatch.setattr(logs.os, "write", scarce)
        for _ in range(3):
            writer.emit(record("lost"))
        assert writer.flushed()
        room[0] = 1 << 20
        writer.emit(record("there"))
        assert writer.flushed()
    torn, note, line = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert len(torn) == 10
    assert json.loads(note)["lines"] == 3 and json.loads(line)["event"] == "there"


BLOCKED, CLOSED, FULL = "blocked", "closed", "full"


@pytest.mark.parametrize("kind", [BLOCKED, CLOSED, FULL])
def test_the_service_goes_on_and_ends_without_its_log(start: Start, kind: str) -> None:
    """Standard error is a pipe that nobody reads and that is full, closed, or a disk without room."""
    reader, descriptor = os.pipe()
    os.set_blocking(descriptor, False)
    if kind == BLOCKED:
        while True:
            try:
                os.write(descriptor, b"x" * 4096)
            except BlockingIOError:
                break
    os.set_blocking(descriptor, True)
    options = {
        BLOCKED: {"stderr": descriptor},
        CLOSED: {"stderr": None, "preexec_fn": lambda: os.close(2)},
        FULL: {"stderr": os.open("/dev/full", os.O_WRONLY)},
    }[kind]
    running = start(**options)
    for _ in range(5):
        assert running.http.post("/v1/completions", json=PROMPT).status_code == 200
        assert running.http.get("/v1/nothing").status_code == 404
    running.process.terminate()
    assert running.process.wait(30) == 0
    os.close(reader), os.close(descriptor)


@pytest.mark.parametrize("kind", [CLOSED, FULL])
def test_the_address_need_not_be_read(kind: str, tmp_path: Path) -> None:
    """Standard output is closed or full: the server runs, and its end is a good one."""
    from common.serving.listener import address, listen
    from common.serving.options import ServerOptions

    with listen(ServerOptions(port=0)) as listener:
        port = address(listener).rpartition(":")[2]
    command = [sys.executable, "-m", "stages.m3_paged_kv", "serve", "--port", port, "--model", TINY]
    output = {"stdout": os.open("/dev/full", os.O_WRONLY)} if kind == FULL else {"preexec_fn": lambda: os.close(1)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu", "--dtype", "fp32"], cwd=ROOT, stderr=log, **output)
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/health") or process.poll() is not None)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines][:1] == ["draining"]


def _answers(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (OSError, urllib.error.URLError):
        return False
