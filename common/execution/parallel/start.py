"""How an engine gets its ranks: rank 0 starts the others on its host, or `torchrun` all of them, on several hosts."""

import importlib
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from common.config import EngineConfig
from common.errors import UserError, one_line, require
from common.execution.cores import use_threads
from common.execution.parallel.ranks import PATIENCE, STARTING, Ranks
from common.execution.parallel.runner import LeadRunner, follow
from common.execution.parallel.split import Split
from common.models.load import open_source
from common.watch.progress import listen

if TYPE_CHECKING:
    from common.engine import Engine

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_joined: list[Ranks] = []


def follows() -> bool:
    """Has `torchrun` started this process as another rank than 0?"""
    return set(TORCHRUN) <= os.environ.keys() and os.environ["RANK"] != "0"


def on_ranks(build: "Callable[[EngineConfig], Engine]") -> "Callable[[EngineConfig], Engine]":
    """A stage's way to build its engine, on as many ranks as `tensor_parallel_size` says. With one it is as it was."""

    def build_all(config: EngineConfig) -> "Engine":
        if config.tensor_parallel_size == 1:
            return build(config)
        mine = _join(config) if set(TORCHRUN) <= os.environ.keys() else _start(build.__module__, config)
        ranks = mine.ranks
        assert ranks is not None
        try:
            engine = build(mine)
            ranks.least(0)  # all are ready
            if ranks.rank > 0:
                follow(engine.runner, ranks)
                sys.exit(0)
        except Exception as error:
            raise ranks.fail(error) from error
        except KeyboardInterrupt as error:
            ranks.fail(error)
            raise
        ranks.patience = PATIENCE
        engine.runner = LeadRunner(engine.runner, ranks, config.max_num_seqs)
        weakref.finalize(engine, ranks.close)
        return engine

    return build_all


def _placed(config: EngineConfig, local_rank: int, local_size: int) -> EngineConfig:
    """A copy for the rank's own device."""
    mine = copy(config)
    if config.torch_device.type == "cuda":
        first, there = config.torch_device.index or 0, torch.cuda.device_count()
        few = f"{local_size} ranks on this host need as many GPUs from cuda:{first} on, and PyTorch sees {there}"
        require(first + local_size <= there, f"{few}: lower tensor_parallel_size")
        mine.device = mine.torch_device = torch.device("cuda", first + local_rank)
        torch.cuda.set_device(mine.torch_device)
    return mine


def _start(module: str, config: EngineConfig) -> EngineConfig:
    """Start the other ranks on this host, which share the CPU's threads out, and wait until they have joined."""
    size, threads = config.tensor_parallel_size, torch.get_num_threads()
    whole = open_source(config.model, config.torch_device, config.seed, progress=None).config
    split, mine = Split(whole, 0, size), _placed(config, 0, size)  # refused before anything is started
    own = max(1, threads // size) if mine.torch_device.type == "cpu" else threads
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    modules = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": modules, "OMP_NUM_THREADS": str(own), "NUMBA_NUM_THREADS": str(own)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            place = dict(zip(TORCHRUN, map(str, (rank, size, rank, size, "127.0.0.1", store.port)), strict=True))
            command, pipe = [sys.executable, "-P", "-c", f"from {__name__} import work; work()"], subprocess.PIPE
            process = subprocess.Popen(command, env=environment | place, stdin=pipe, stdout=2, start_new_session=True)
            processes.append(process)
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(pickle.dumps((module, config)))
        mine.ranks = Ranks(split, store, mine.torch_device, processes=processes)
    except BaseException as error:
        for process in processes:
            process.kill()
            process.wait()
        if isinstance(error, RuntimeError):
            raise UserError(f"the other ranks did not start: {one_line(error)}") from error
        raise
    use_threads(own)
    mine.ranks.on_close.append(lambda: use_threads(threads))
    return mine


def work() -> None:
    """A rank that rank 0 has started: the stage's module and the options come on standard input."""
    listen(lambda *_: None)  # rank 0 has the same to say
    given: tuple[str, EngineConfig] = pickle.load(sys.stdin.buffer)
    try:
        on_ranks(importlib.import_module(given[0]).build)(given[1])
    finally:
        os._exit(0)  # at once: threads of the collectives may wait for ranks that have ended


def _join(config: EngineConfig) -> EngineConfig:
    """The ranks that `torchrun` has started, or rank 0."""
    rank, count, local_rank, local_size = (int(os.environ[name]) for name in TORCHRUN[:4])
    size = config.tensor_parallel_size
    require(count == size, f"torchrun started {count} processes, but tensor_parallel_size is {size}: give the same")
    require(not _joined, "torchrun has started the ranks of one engine: start another one for each")
    store, _, _ = next(rendezvous("env://", timeout=STARTING))
    whole = open_source(config.model, config.torch_device, config.seed, progress=None).config
    mine = _placed(config, local_rank, local_size)
    mine.ranks = Ranks(Split(whole, rank, size), store, mine.torch_device, local_rank, local_size == size)
    _joined.append(mine.ranks)
    return mine
