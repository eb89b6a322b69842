"""A rank that rank 0 has started: builds the same engine for its own part, and runs what it is told."""

import importlib
import os
import pickle
import select
import signal
import sys
import threading
import time
from typing import BinaryIO

import torch
import torch.distributed as dist

from common.errors import UserError, one_line
from common.execution.cores import use_threads
from common.execution.parallel.ranks import Ranks
from common.execution.parallel.runner import follow
from common.execution.parallel.start import Order, placed
from common.execution.parallel.watch import BEAT
from common.watch.progress import listen

LOST = 75  # the exit status after a rank has lost another one: it says nothing, as the first cause counts


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    voice = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what else is printed goes where rank 0's errors go
    order: Order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_beat, args=(voice,), daemon=True).start()
    listen(lambda *_: None)  # rank 0 has the same to say
    status = 0
    try:
        work(*order)
    except UserError as error:
        voice.write(f"!{error}\n".encode())
        status = 2
    except Exception as error:
        if not isinstance(error, dist.DistError | RuntimeError) or "gloo" not in str(error):
            voice.write(f"!{type(error).__name__}: {one_line(error)}\n".encode())
        status = LOST
    os._exit(status)  # at once: threads of the collectives may wait for ranks that have gone


def work(*order: object) -> None:
    module, config, split, port, threads, leader = order  # pyright: ignore
    use_threads(threads)
    config.torch_device = leader
    mine = placed(config, split.rank, split.size)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    store.set(f"here-{split.rank}", "")
    mine.ranks = Ranks(split, store, mine.torch_device, None, split.rank)
    engine = importlib.import_module(module).build(mine)
    mine.ranks.least(0)
    follow(engine.runner, mine.ranks)


def _beat(voice: BinaryIO) -> None:
    """A sign of life from time to time; the end when rank 0 has gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        voice.write(b".")
        if select.select([sys.stdin.fileno()], [], [], BEAT)[0]:
            break  # it never writes again: this is the pipe's end
        time.sleep(0.0)
    os._exit(LOST)


if __name__ == "__main__":
    main()
