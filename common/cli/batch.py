"""`batch`: a file of requests to a file of answers, a line each, in the same order. So it can be resumed: as many lines
as the file of answers has whole are done, whenever it was killed."""

import asyncio
import fcntl
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from common.cli.generate import loaded_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError, one_line, require
from common.serving.batch import BEGIN, answers_to, custom_id, read_lines
from common.serving.options import ServerOptions
from common.serving.service import Service
from common.watch.progress import progress_bar, say


def batch(source: Path, target: Path, answers: Callable[[Path, int], Generator[bytes]]) -> None:
    """Append what is missing, unbuffered: what is answered is in the file, however this process ends. answers: lines,
    one or more at a time, for the requests of a file from a place on."""
    begun = time.perf_counter()
    try:
        require(not target.exists() or not source.samefile(target), "requests and answers are the same file: name two")
        with source.open("rb") as requests, open(target, "a+b", buffering=0) as kept:
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
            total = sum(1 for _ in read_lines(requests))
            done, start = _resume(requests, kept, target)
            with progress_bar("answering", total) as advance, closing(answers(source.absolute(), start)) as more:
                advance(done)
                for lines in more if done < total else ():
                    advance(lines.count(b"\n"))
                    while lines:
                        lines = lines[kept.write(lines) :]
    except BlockingIOError:
        raise UserError(f"{target} is being written by another batch: wait for it, or name another file") from None
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, and the same command goes on from there") from None
    say(f"{total - done} answers in {time.perf_counter() - begun:.1f} s, after {done} that were in {target}")


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


class Answerer(ExitStack):
    """An engine, and what it answers with; lines wait as long as it takes."""

    def __init__(self, build: Build, config: EngineConfig, served_name: str | None) -> None:
        super().__init__()
        engine = self.enter_context(loaded_engine(build, config))
        patient: dict[str, Any] = {"max_queue": 1 << 20, "max_n": engine.scheduler.max_num_seqs, "encode_timeout": 1e6}
        self._service = Service(engine, ServerOptions(served_name=served_name, **patient))
        self._runner = self.enter_context(asyncio.Runner())
        self._service.thread.start(self._runner.get_loop())
        self.callback(self._service.thread.stop)

    def answers(self, source: Path, begin: int, end: float = math.inf) -> Iterator[bytes]:
        """To the lines that begin between two places of a file."""
        with source.open("rb") as requests:
            lines = answers_to(read_lines(requests, begin, end), self._service)
            while line := self._runner.run(anext(lines, b"")):  # pyright: ignore[reportArgumentType]
                yield line


def answers(build: Build, config: EngineConfig, served_name: str | None, source: Path, start: int) -> Generator[bytes]:
    with Answerer(build, config, served_name) as answerer:
        yield from answerer.answers(source, start)
