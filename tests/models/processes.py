"""Real processes, for the tests of locks, kills and Ctrl-C: forked from one that has imported PyTorch, which takes
seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.models.processes", "tests.m7.stopping", "common.models.sources.gguf_file"])


def start(log: Path, work: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process of its own. What it says on standard error, its traceback too, is in `log`."""
    process = FORKS.Process(target=_logged, args=(log, work, *arguments), daemon=True)
    process.start()
    return process


def _logged(log: Path, work: Callable[..., None], *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    sys.stderr = log.open("w", buffering=1)
    work(*arguments)


def load_embedded(cache: Path) -> None:
    from common.models import load_model

    os.environ["FOLOVLLM_CACHE"] = str(cache)
    load_model("smollm2-135m-instruct")


def convert_at_once(together: Barrier, gguf_path: Path, folder: Path) -> None:
    from common.models.sources.embedded import convert

    together.wait(60)
    convert(gguf_path, folder)
