"""How an engine gets its ranks: rank 0 starts the others on its host, or `torchrun` all of them, on several hosts."""

import importlib
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from copy import copy
from functools import wraps
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import torch
import torch.distributed

from common.config import EngineConfig
from common.errors import UserError, one_line, require
from common.execution.cores import use_threads
from common.execution.parallel.ranks import PATIENCE, STARTING, Ranks, c10d
from common.execution.parallel.runner import RankRunner
from common.execution.parallel.split import Split
from common.models.load import open_source
from common.watch.progress import listen

if TYPE_CHECKING:
    from common.engine import Engine

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

ENGINE = "engine"  # in the store: what is built

_joined: list[Ranks] = []


def follows() -> bool:
    """Has `torchrun` started this process as another rank than 0?"""
    return set(TORCHRUN) <= os.environ.keys() and os.environ["RANK"] != "0"


def on_ranks(build: "Callable[[EngineConfig], Engine]") -> "Callable[[EngineConfig], Engine]":
    """A stage's way to build its engine, on as many ranks as `tensor_parallel_size` says. With one it is as it was."""

    @wraps(build)
    def build_all(config: EngineConfig) -> "Engine":
        if config.tensor_parallel_size == 1:
            return build(config)
        require(c10d is not None, "this PyTorch has no torch.distributed: install another, or tensor_parallel_size=1")
        mine, ranks = _join(config) if set(TORCHRUN) <= os.environ.keys() else _start(build.__module__, config)
        mine.ranks, threads = ranks, torch.get_num_threads()
        try:
            engine = build(mine)
            use_threads(threads)  # Numba's, too, now that it is there
            engine.runner = runner = RankRunner(engine.runner, ranks, config.max_num_seqs)
            ranks.least(0)  # all are ready
            if ranks.rank > 0:
                runner.follow()
                os._exit(0)  # at once: threads of the collectives may wait for ranks that have ended
        except BaseException as error:
            failed = ranks.fail(error)
            if isinstance(error, Exception):
                raise failed from error
            raise
        ranks.patience = PATIENCE
        weakref.finalize(engine, ranks.close)
        return engine

    return build_all


def _own(config: EngineConfig, rank: int, local_rank: int, local_size: int) -> tuple[EngineConfig, Split]:
    """A copy of the options for the rank's own device, and its part of the model; refused before anything starts."""
    mine, device = copy(config), config.torch_device
    if device.type == "cuda":
        first, there = device.index or 0, torch.cuda.device_count()
        few = f"{local_size} ranks on this host need as many GPUs from cuda:{first} on, and PyTorch sees {there}"
        require(first + local_size <= there, f"{few}: lower tensor_parallel_size")
        mine.device = mine.torch_device = torch.device("cuda", first + local_rank)
        torch.cuda.set_device(mine.torch_device)
    whole = open_source(config.model, device, config.seed, progress=None).config
    return mine, Split(whole, rank, config.tensor_parallel_size)


def _start(module: str, config: EngineConfig) -> tuple[EngineConfig, Ranks]:
    """Start the other ranks on this host, which share the CPU's threads out, and wait until they have joined."""
    size, threads = config.tensor_parallel_size, torch.get_num_threads()
    mine, split = _own(config, 0, 0, size)
    own = max(1, threads // size) if mine.torch_device.type == "cpu" else threads
    store = vars(torch.distributed)["TCPStore"]("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    modules = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": modules, "OMP_NUM_THREADS": str(own), "NUMBA_NUM_THREADS": str(own)}
    store.set(ENGINE, pickle.dumps((module, config)))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            place = dict(zip(TORCHRUN, map(str, (rank, size, rank, size, "127.0.0.1", store.port)), strict=True))
            command, env = [sys.executable, "-P", "-c", f"from {__name__} import work; work()"], environment | place
            processes.append(subprocess.Popen(command, env=env, stdin=DEVNULL, stdout=2, start_new_session=True))
        ranks = Ranks(split, store, mine.torch_device, processes=processes)
    except BaseException as error:
        for process in processes:
            process.kill()
            process.wait()
        if isinstance(error, RuntimeError):
            raise UserError(f"the other ranks did not start: {one_line(error)}") from error
        raise
    use_threads(own)
    ranks.on_close.append(lambda: use_threads(threads))
    return mine, ranks


def work() -> None:
    """A rank that rank 0 has started; the stage's module and the options are in the store."""
    listen(lambda *_: None)  # rank 0 has the same to say
    try:
        module, config = pickle.loads(next(c10d.rendezvous("env://", timeout=STARTING))[0].get(ENGINE))
        on_ranks(importlib.import_module(module).build)(config)
    finally:
        os._exit(1)


def _join(config: EngineConfig) -> tuple[EngineConfig, Ranks]:
    """The ranks that `torchrun` has started, or rank 0."""
    rank, count, local_rank, local_size = (int(os.environ[name]) for name in TORCHRUN[:4])
    size = config.tensor_parallel_size
    require(count == size, f"torchrun started {count} processes, but tensor_parallel_size is {size}: give the same")
    require(not _joined, "torchrun has started the ranks of one engine: start another one for each")
    store, _, _ = next(c10d.rendezvous("env://", timeout=STARTING))
    mine, split = _own(config, rank, local_rank, local_size)
    _joined.append(Ranks(split, store, mine.torch_device, local_size == size))
    return mine, _joined[0]
