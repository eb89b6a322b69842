"""`batch`: a file of requests to a file of answers, a line each, in the same order.

The order is what makes it resumable: as many lines as the file of answers has whole are done, whenever it was killed.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Generator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError, one_line, require
from common.execution.cores import in_own_thread
from common.serving.batch import Answerer, custom_id, read_lines
from common.watch.progress import progress_bar


def batch(
    build: Build, config: EngineConfig, source: Path, target: Path, served_name: str | None, engines: int = 0
) -> None:
    """On one engine in this process, or on so many of Ray's."""
    with _files(source, target) as (start, take), contextlib.ExitStack() as stack:
        if engines:
            from common.scale.batches import answers

            for lines in answers(build, config, served_name, engines, source.absolute(), start):
                take(lines)
            return
        answerer = Answerer(in_own_thread(lambda: stack.enter_context(ready_engine(build, config))), served_name)

        async def run() -> None:
            try:
                with source.open("rb") as requests:
                    async for line in answerer.all(read_lines(requests, start)):
                        take(line)
            finally:
                answerer.stop()

        asyncio.run(run())


@contextlib.contextmanager
def _files(source: Path, target: Path) -> Generator[tuple[int, Callable[[bytes], None]]]:
    """Where in `source` the first request without an answer begins, and what appends answers to `target`, unbuffered:
    those are there, however this process ends. With a bar, and a line at the end."""
    begun = time.perf_counter()
    try:
        require(not target.exists() or not source.samefile(target), "requests and answers are the same file: name two")
        with source.open("rb") as requests, open(target, "a+b", buffering=0) as answers:
            _lock(answers, target)
            total = sum(1 for _ in read_lines(requests))
            done, start = _resume(requests, answers, target)
            with progress_bar("answering", total) as advance:
                advance(done)

                def take(lines: bytes) -> None:
                    advance(lines.count(b"\n"))
                    while lines:
                        lines = lines[answers.write(lines) :]

                yield start, take
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, and the same command goes on from there") from None
    said = f"{total - done} answers in {time.perf_counter() - begun:.1f} s, after {done} that were in {target}"
    Console(stderr=True).print(said, style="dim", highlight=False, markup=False, soft_wrap=True)


def _lock(answers: FileIO, target: Path) -> None:
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target} is being written by another batch: wait for it, or name another file") from None


def _resume(requests: BinaryIO, answers: FileIO, target: Path) -> tuple[int, int]:
    """How many answers are whole, and where the next request begins; half an answer at the end is cut off."""
    lines, whole, count, place = read_lines(requests), 0, 0, 0
    with target.open("rb") as kept:
        while (line := kept.readline()).endswith(b"\n"):
            request = next(lines, None)
            try:
                same = request is not None and json.loads(line)["custom_id"] == custom_id(request)
            except (ValueError, TypeError, KeyError):
                same = False
            require(same, f"{target} holds answers to other requests (line {count + 1}): name another file")
            whole, count, place = whole + len(line), count + 1, requests.tell()
    answers.truncate(whole)
    return count, place
