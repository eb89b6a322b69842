"""The processes of one engine, as one of them sees the others: collectives, messages, and whether all are alive."""

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d as dist

from common.errors import UserError, one_line
from common.execution.parallel.split import Split

STARTING, LOADING, FOREVER = timedelta(minutes=1), timedelta(minutes=30), timedelta(days=3650)
PATIENCE = timedelta(seconds=15)  # of rank 0, in a step; the others notice at once when rank 0 ends
SAID = "said"  # in the store: what ended a rank
OVER = b"over"


class Ranks:
    """Rank 0 leads: it schedules, and tells the others what to do. All call the same collectives in the same order.

    On GPUs they are NCCL's, which CUDA graphs can hold. On CPUs each rank sends its part to the others over gloo, and
    all add in the same order: gloo's own all-reduce hands each call to another thread, which takes several times as
    long for what a decode step sums. `counts`: collectives so far; `seconds`: spent in them, on a CPU.
    """

    def __init__(
        self, split: Split, store: dist.Store, device: torch.device, local_rank: int = 0, one_host: bool = True,
        processes: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:  # fmt: skip
        """Waits for the others. store: where they find one another. processes: the ranks that rank 0 has started."""
        self.split, self.rank, self.size, self.local_rank = split, split.rank, split.size, local_rank
        self.counts, self.seconds, self.patience = Counter[str](), 0.0, LOADING if split.rank == 0 else FOREVER
        self.on_close: list[Callable[[], None]] = []
        self._lost: str | None = None
        self._ending = threading.Lock()  # a server asks `lost` while another thread is in a step
        self._store: Any = store
        self._processes = processes
        gloo: Any = dist.ProcessGroupGloo
        options: Any = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1") if one_host else gloo.create_default_device()]
        options._timeout, options._threads = STARTING, 1
        self._gloo: Any = gloo(dist.PrefixStore("gloo", store), self.rank, self.size, options)
        self._nccl: Any = None
        if device.type == "cuda":
            self._nccl = vars(dist)["ProcessGroupNCCL"](dist.PrefixStore("nccl", store), self.rank, self.size)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over the ranks. May be written over x."""
        if self._nccl is None:
            parts = self.gather(x, "sum")
            return parts[0] + parts[1] if self.size == 2 else torch.stack(parts).sum(0)
        self.counts["sum"] += 1
        self._nccl.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor, kind: str = "gather") -> list[torch.Tensor]:
        """x of every rank, in their order; all of the same shape. kind: what `counts` calls it."""
        self.counts[kind] += 1
        x, begin = x.contiguous(), time.perf_counter()
        if self._nccl is None:
            parts = self._exchange(x)
        else:
            whole = x.new_empty(self.size, *x.shape)
            self._nccl._allgather_base(whole, x).wait()
            parts = list(whole)
        self.seconds += time.perf_counter() - begin
        return parts

    def least(self, *values: int) -> tuple[int, ...]:
        """Of each of these numbers of the host, the smallest of any rank."""
        return tuple(torch.stack(self._exchange(torch.tensor(values))).amin(0).tolist())

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [x if rank == self.rank else torch.empty_like(x) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = [self._gloo.send([x], rank, 0) for rank in others]
        for work in works + [self._gloo.recv([parts[rank]], rank, 0) for rank in others]:
            work.wait(self.patience)
        return parts

    def tell(self, message: bytes) -> None:
        """From rank 0 to all others."""
        parts = torch.tensor([len(message)]), torch.frombuffer(bytearray(message), dtype=torch.uint8)
        for work in [self._gloo.send([part], rank, 1) for rank in range(1, self.size) for part in parts]:
            work.wait(self.patience)

    def hear(self) -> bytes:
        """The next message; waits for it."""
        length = torch.zeros(1, dtype=torch.long)
        self._gloo.recv([length], 0, 1).wait(FOREVER)
        message = torch.empty(int(length), dtype=torch.uint8)
        self._gloo.recv([message], 0, 1).wait(FOREVER)
        return message.numpy().tobytes()

    @property
    def lost(self) -> str | None:
        """Why no step can follow, in one line."""
        if self._lost is None and any(process.poll() is not None for process in self._processes):
            self.fail(RuntimeError())
        return self._lost

    @contextmanager
    def together(self) -> Generator[None]:
        """What all ranks do: Ctrl-C waits until it is done, and an error ends the engine, as the others have gone on.
        `UserError` in one line, and again for whatever is tried afterwards."""
        if self.lost is not None:
            raise UserError(self.lost)
        with held_interrupts():
            try:
                yield
            except Exception as error:
                raise self.fail(error) from error

    def fail(self, error: BaseException) -> UserError:
        """End all ranks; returns what to raise: what ended another one, rather than that it has ended."""
        with self._ending:
            return UserError(self._lost or self._end_for(error))

    def _end_for(self, error: BaseException) -> str:
        late = f"a rank did not answer for {PATIENCE.seconds} s"
        causes = [late if "imed out" in str(error) else f"a rank has ended ({one_line(error)})"]
        if self.rank > 0 and "gloo" not in str(error):  # which would only say that another rank has ended
            self._store.set(SAID, f"rank {self.rank}: {type(error).__name__}: {one_line(error)}")
        elif self._store.check([SAID]):
            causes.append(self._store.get(SAID).decode())
        for rank, process in enumerate(self._processes, 1):
            with suppress(subprocess.TimeoutExpired):
                if process.wait(0.0 if isinstance(error, UserError) else 0.3) < 0:
                    causes.append(f"rank {rank} died ({signal.Signals(-process.returncode).name})")
        return self._end(str(error) if isinstance(error, UserError) else f"{causes[-1]}: build a new engine", 0.0)

    def close(self) -> None:
        """End the others, and give back ports and processes. Closing twice is no error."""
        if self._lost is None:
            with self._ending:
                with suppress(RuntimeError):
                    self.tell(OVER)
                self._end("the engine is closed: build a new one", 5.0)

    def _end(self, why: str, patience: float) -> str:
        """patience: seconds that a process has to end by itself."""
        self._lost = why
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            process.kill()
            process.wait()
        if self._nccl is not None:
            self._nccl.abort()
        self._gloo = self._nccl = self._store = None
        for act in self.on_close:
            act()
        return why


@contextmanager
def held_interrupts() -> Generator[None]:
    """A Ctrl-C that comes meanwhile takes effect afterwards. It is the main thread's: in others, nothing to do."""
    before, caught = signal.getsignal(signal.SIGINT), list[Any]()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *given: caught.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(*caught[0])
