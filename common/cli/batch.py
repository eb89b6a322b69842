"""`batch`: a file of requests to a file of answers, a line each, in the same order.

The order is what makes it resumable: as many lines as the file of answers has whole are done, whenever it was killed.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from common.cli.generate import loaded_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError, one_line, require
from common.serving.batch import BEGIN, Answerer, custom_id, read_lines
from common.watch.progress import progress_bar

Answers = Callable[[Path, int], Iterator[bytes]]
"""Of the requests of a file from a place on: lines, one or more at a time."""


def here(build: Build, config: EngineConfig, served_name: str | None) -> Answers:
    """By one engine in this process."""

    def answers(source: Path, start: int) -> Iterator[bytes]:
        with loaded_engine(build, config) as engine, source.open("rb") as requests, asyncio.Runner() as runner:
            answerer = Answerer(engine, served_name)
            lines = answerer.all(read_lines(requests, start))
            try:
                while line := runner.run(anext(lines, b"")):  # pyright: ignore[reportArgumentType]
                    yield line
            finally:
                answerer.stop()

    return answers


def batch(source: Path, target: Path, answers: Answers) -> None:
    """Append what is missing, unbuffered: what is answered is in the file, however this process ends."""
    begun = time.perf_counter()
    try:
        require(not target.exists() or not source.samefile(target), "requests and answers are the same file: name two")
        with source.open("rb") as requests, open(target, "a+b", buffering=0) as kept:
            _lock(kept, target)
            total = sum(1 for _ in read_lines(requests))
            done, start = _resume(requests, kept, target)
            with progress_bar("answering", total) as advance, contextlib.closing(answers(source, start)) as more:
                advance(done)
                for lines in more if done < total else ():
                    advance(lines.count(b"\n"))
                    while lines:
                        lines = lines[kept.write(lines) :]
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
            same = request is not None and line.startswith(BEGIN) and custom_id(line) == custom_id(request)
            require(same, f"{target} holds answers to other requests (line {count + 1}): name another file")
            whole, count, place = whole + len(line), count + 1, requests.tell()
    answers.truncate(whole)
    return count, place
