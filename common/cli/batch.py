"""`batch`: a file of requests to a file of answers, a line each, in the same order.

The order is what makes it resumable: as many lines as the file of answers has whole are done, whenever it was killed.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from common.cli.generate import ready_engine
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError, one_line, require
from common.execution.cores import in_own_thread
from common.serving.batch import AHEAD, FINE, answering, custom_id, in_order
from common.watch.progress import progress_bar

LONGEST = 1 << 24  # bytes of a line; a longer one is cut, and then is no JSON
Take = Callable[[bytes], None]


def batch(build: Build, config: EngineConfig, source: Path, target: Path, served_name: str | None) -> None:
    """On one engine, in this process."""
    with answers_file(source, target) as (start, take), contextlib.ExitStack() as stack:
        engine = in_own_thread(lambda: stack.enter_context(ready_engine(build, config)))

        async def run() -> None:
            async with answering(engine, served_name) as answer:
                with source.open("rb") as requests:
                    requests.seek(start)
                    ahead = AHEAD * engine.scheduler.max_num_seqs
                    async for line in in_order(read_lines(requests), answer, ahead):
                        take(line)

        asyncio.run(run())


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Those that are not blank."""
    while line := file.readline(LONGEST):
        whole = line
        while len(line) == LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST)
        if whole.strip():
            yield whole


@contextlib.contextmanager
def answers_file(source: Path, target: Path) -> Generator[tuple[int, Take]]:
    """Where in `source` the first request without an answer begins, and what appends the next answer to `target`. With
    a bar, and at the end a line of figures."""
    try:
        with source.open("rb") as requests, _appended(target) as answers:
            require(not os.path.samestat(os.fstat(requests.fileno()), os.fstat(answers.fileno())),
                    "requests and answers are the same file: name another one for the answers")  # fmt: skip
            total = sum(1 for _ in read_lines(requests))
            requests.seek(0)
            done = _resume(requests, answers, target)
            start, begun, failed = requests.tell(), time.perf_counter(), 0
            with progress_bar("answering", total) as advance:
                advance(done)

                def take(line: bytes) -> None:
                    nonlocal failed
                    failed += FINE not in line[: line.find(b'"body": ')]
                    while line:
                        line = line[answers.write(line) :]
                    advance(1)

                yield start, take
            seconds, count = time.perf_counter() - begun, total - done
            before = f", {done} were there" if done else ""
            line = f"{count} answers in {seconds:.1f} s{before}; {failed} of them errors, {target}"
            Console(stderr=True).print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, and the same command goes on from there") from None


def _appended(target: Path) -> FileIO:
    """Unbuffered: a line that was written is there, however this process ends. One process writes it at a time."""
    file = open(target, "a+b", buffering=0)  # noqa: SIM115 (the caller closes it)
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target} is being written by another batch: wait for it, or name another file") from None
    return file


def _resume(requests: BinaryIO, answers: FileIO, target: Path) -> int:
    """How many answers are whole; half a line at the end is cut off. Leaves both files behind the last whole one."""
    whole = count = 0
    lines = read_lines(requests)
    with open(target, "rb") as kept:
        while (line := kept.readline()).endswith(b"\n"):
            request = next(lines, None)
            other = f"{target} holds answers to other requests (line {count + 1}): name another file"
            try:
                same = request is not None and json.loads(line)["custom_id"] == custom_id(request)
            except (ValueError, TypeError, KeyError):
                same = False
            require(same, other)
            whole, count = whole + len(line), count + 1
    answers.truncate(whole)
    answers.seek(whole)
    return count


def batch_on_ray(
    build: str, config: EngineConfig, source: Path, target: Path, served_name: str | None, engines: int
) -> None:
    """On several engines, each an actor of Ray Data. build: of the stage, `module:function`."""
    try:
        from common.scale.batches import answers
    except ModuleNotFoundError as error:
        raise UserError(f"--ray needs {error.name}, which is not installed: pip install '.[scale]'") from None
    with answers_file(source, target) as (start, take):
        ahead = AHEAD * config.max_num_seqs
        for line in answers(build, config, served_name, engines, source.absolute(), _parts(source, start, ahead)):
            take(line)


def _parts(source: Path, start: int, lines: int) -> list[tuple[int, int]]:
    """Where parts of so many lines begin and end, in bytes."""
    with source.open("rb") as file:
        file.seek(start)
        places = [start]
        for count, _ in enumerate(read_lines(file), start=1):
            if count % lines == 0:
                places.append(file.tell())
        places.append(file.seek(0, os.SEEK_END))
    return [(begin, end) for begin, end in pairwise(places) if begin < end]
