"""How an engine gets its ranks: it starts them itself on this host, or `torchrun` has, on one host or several."""

import os
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from common.config import EngineConfig
from common.errors import UserError, require
from common.execution.cores import use_threads
from common.execution.parallel.ranks import LOADING, Ranks
from common.execution.parallel.runner import follow
from common.execution.parallel.split import Split
from common.execution.parallel.watch import STARTING, Watch
from common.models.load import open_source

if TYPE_CHECKING:
    from common.engine import Engine

WORKER = "common.execution.parallel.worker"
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

Order = tuple[str, EngineConfig, Split, int, int, torch.device]
"""To a process: the stage's module, the options, its part, the store's port, its threads and its device."""

_torchrun_engines: list[str] = []


def follows() -> bool:
    """Has `torchrun` started this process as one that only follows?"""
    return os.environ.keys() >= TORCHRUN and os.environ["RANK"] != "0"


def build_on_ranks(build: "Callable[[EngineConfig], Engine]", config: EngineConfig) -> "Engine":
    """The engine of rank 0; on another rank the process ends with the engine."""
    name, size = config.model, config.tensor_parallel_size
    first = not follows() or os.environ["LOCAL_RANK"] == "0"
    source = open_source(name, config.torch_device, config.seed, progress=None) if first else None
    whole = source.config if source is not None else None
    if whole is not None:
        Split(whole, 0, size)  # refused before anything is started
    if os.environ.keys() >= TORCHRUN:
        mine = _join(config)
    else:
        assert whole is not None
        mine = _start(build.__module__, config, Split(whole, 0, size))
    ranks = mine.ranks
    assert ranks is not None
    try:
        engine = build(mine)
        ranks.least(0)  # all are ready
    except Exception as error:
        raise ranks.fail(error) from error
    except BaseException:
        ranks.fail(UserError("interrupted"))
        raise
    if ranks.rank > 0:
        follow(engine.runner, ranks)
        sys.exit(0)
    weakref.finalize(engine, ranks.close)
    return engine


def placed(config: EngineConfig, local_rank: int, local_size: int) -> EngineConfig:
    """A copy for the rank's own device."""
    mine = copy(config)
    if config.torch_device.type == "cuda":
        first, count = config.torch_device.index or 0, torch.cuda.device_count()
        require(first + local_size <= count, f"{local_size} ranks need as many GPUs from cuda:{first} on: there are {count}")
        mine.device = mine.torch_device = torch.device("cuda", first + local_rank)
        torch.cuda.set_device(mine.torch_device)
    return mine


def _start(module: str, config: EngineConfig, split: Split) -> EngineConfig:
    """Start the other ranks on this host, sharing out the CPU's threads, and wait until they have joined."""
    size, mine = split.size, placed(config, 0, split.size)
    threads = torch.get_num_threads()
    own = max(1, threads // size) if mine.torch_device.type == "cpu" else threads
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    paths = [str(Path(__file__).parents[3]), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(own))
    processes: list[subprocess.Popen[bytes]] = []
    watch = None
    try:
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                start_new_session=True,  # Ctrl-C is rank 0's
            )  # fmt: skip
            processes.append(process)
            order: Order = (module, config, Split(split.whole, rank, size), store.port, own, mine.torch_device)
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(order))
            process.stdin.flush()
        watch = Watch(processes)
        _wait_for(store, size, watch)
        mine.ranks = Ranks(split, store, mine.torch_device, watch)
    except BaseException:
        (watch or Watch(processes)).close(kill=True)
        raise
    if own != threads:
        use_threads(own)
        mine.ranks.on_close.append(lambda: use_threads(threads))
    return mine


def _wait_for(store: dist.TCPStore, size: int, watch: Watch) -> None:
    names, deadline = [f"here-{rank}" for rank in range(1, size)], time.monotonic() + STARTING
    while not store.check(names):
        require(watch.lost is None, watch.lost or "")
        require(time.monotonic() < deadline, f"the other ranks did not start within {STARTING:.0f} s")
        time.sleep(0.02)


def _join(config: EngineConfig) -> EngineConfig:
    """The ranks that `torchrun` has started."""
    env, size = os.environ, config.tensor_parallel_size
    rank, count, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    require(count == size, f"torchrun started {count} processes, but tensor_parallel_size is {size}: give the same")
    require(not _torchrun_engines, "torchrun has started the ranks of one engine: start another one for each")
    _torchrun_engines.append(config.model)
    on_host = int(env["LOCAL_WORLD_SIZE"])
    mine = placed(config, local, on_host)
    rendezvous: Any = dist.rendezvous("env://", timeout=LOADING)
    store, _, _ = next(rendezvous)
    if local == 0:
        store.set(f"opened-{rank}", "")  # the model is here, downloaded or converted
    store.wait([f"opened-{rank - local}"], LOADING)
    whole = open_source(config.model, config.torch_device, config.seed, progress=None).config
    mine.ranks = Ranks(Split(whole, rank, size), store, mine.torch_device, None, local, on_host == size)
    return mine
