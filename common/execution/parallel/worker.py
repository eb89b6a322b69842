"""A rank that rank 0 has started as `torchrun` would: builds the same engine of its own part, and runs what it is told.
It reads the stage's module and the options from standard input."""

import importlib
import os
import pickle
import sys

from common.config import EngineConfig
from common.execution.parallel.start import on_ranks
from common.watch.progress import listen


def main() -> None:
    listen(lambda *_: None)  # rank 0 has the same to say
    given: tuple[str, EngineConfig] = pickle.load(sys.stdin.buffer)
    try:
        on_ranks(importlib.import_module(given[0]).build)(given[1])
    finally:
        os._exit(0)  # at once: threads of the collectives may wait for ranks that have ended


if __name__ == "__main__":
    main()
