"""The processes of one engine, as one of them sees the others: collectives, messages, and whether all are alive."""

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed

from common.errors import UserError, one_line
from common.execution.parallel.split import Split

STARTING, LOADING, FOREVER = timedelta(minutes=1), timedelta(minutes=30), timedelta(days=3650)
PATIENCE = timedelta(seconds=15)  # of rank 0, in a step; the others notice at once when rank 0 ends
SAID = "said"  # in the store: what ended a rank
OVER = b"over"
c10d: Any = vars(torch.distributed).get("distributed_c10d")  # None: PyTorch was built without it


class Ranks:
    """Rank 0 leads: it schedules, and tells the others what to do. All call the same collectives in the same order.

    On GPUs they are NCCL's, on the stream of the kernels around them, so CUDA graphs hold them too. On CPUs each rank
    sends its part to the others over gloo, and all add in the same order: gloo's own all-reduce hands each call to
    another thread, which takes several times as long for what a decode step sums. `counts`: collectives so far;
    `seconds`: spent in them, on a CPU. `on_close`: called before the groups end.
    """

    def __init__(
        self, split: Split, store: Any, device: torch.device, one_host: bool = True,
        processes: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:  # fmt: skip
        """Waits for the others. store: where they find one another. processes: the ranks that rank 0 has started."""
        self.split, self.rank, self.size = split, split.rank, split.size
        self.counts, self.seconds, self.patience = Counter[str](), 0.0, LOADING if split.rank == 0 else FOREVER
        self.on_close: list[Callable[[], None]] = []
        self._lost: str | None = None
        self._ending = threading.Lock()  # a server asks `lost` while another thread is in a step
        self._store, self._processes = store, processes
        gloo = c10d.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1") if one_host else gloo.create_default_device()]
        options._timeout, options._threads = STARTING, 1
        self._gloo: Any = gloo(c10d.PrefixStore("gloo", store), self.rank, self.size, options)
        self._nccl: Any = None
        if device.type == "cuda":
            self._nccl = c10d.ProcessGroupNCCL(c10d.PrefixStore("nccl", store), self.rank, self.size)
        self._sum, self._gather = c10d.AllreduceOptions(), c10d.AllgatherOptions()
        self._sum.asyncOp = self._gather.asyncOp = False  # on the current stream, not on one of NCCL's own

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over the ranks. May be written over x."""
        if self._nccl is None:
            return reduce(torch.add, self.gather(x, "sum"))
        self.counts["sum"] += 1
        self._nccl.allreduce([x], self._sum)
        return x

    def gather(self, x: torch.Tensor, kind: str = "gather") -> list[torch.Tensor]:
        """x of every rank, in their order; all of the same shape. kind: what `counts` calls it."""
        self.counts[kind] += 1
        x, begin = x.contiguous(), time.perf_counter()
        if self._nccl is None:
            parts = self._exchange(x)
        else:
            whole = x.new_empty(self.size, *x.shape)
            self._nccl._allgather_base(whole, x, self._gather)
            parts = list(whole)
        self.seconds += time.perf_counter() - begin
        return parts

    def least(self, *values: int) -> tuple[int, ...]:
        """Of each of these numbers of the host, the smallest of any rank. Waits for all ranks."""
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
        interrupts, main = list[object](), threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, lambda *given: interrupts.append(given)) if main else None
        try:
            yield
        except Exception as error:
            raise self.fail(error) from error
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
            if interrupts:
                signal.raise_signal(signal.SIGINT)

    def fail(self, error: BaseException) -> UserError:
        """End all ranks; returns what to raise: what ended another one, rather than that it has ended."""
        with self._ending:
            if self._lost is None:
                self._end(self._cause(error), 0.0)
            return UserError(str(self._lost))

    def _cause(self, error: BaseException) -> str:
        late = f"a rank did not answer for {PATIENCE.seconds} s"
        cause = late if "imed out" in str(error) else f"a rank has ended ({one_line(error)})"
        with suppress(RuntimeError):  # the store may have ended, too
            if self.rank > 0 and "gloo" not in str(error):  # which would only say that another rank has ended
                self._store.set(SAID, f"rank {self.rank}: {type(error).__name__}: {one_line(error)}")
            elif self._store.check([SAID]):
                cause = self._store.get(SAID).decode()
        for rank, process in enumerate(self._processes, 1):
            with suppress(subprocess.TimeoutExpired):
                if process.wait(0.3) < 0:
                    cause = f"rank {rank} died ({signal.Signals(-process.returncode).name})"
        return str(error) if isinstance(error, UserError) else f"{cause}: build a new engine"

    def close(self) -> None:
        """End the others, and give back ports and processes. Closing twice is no error."""
        if self._lost is None:
            with self._ending:
                with suppress(RuntimeError):
                    self.tell(OVER)
                self._end("the engine is closed: build a new one", 5.0)

    def _end(self, why: str, patience: float) -> None:
        """patience: seconds that a process has to end by itself."""
        self._lost = why
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            process.kill()
            process.wait()
        for act in self.on_close:
            act()
        if self._nccl is not None:
            self._nccl.abort()  # waits for ever while a CUDA graph holds its collectives
        self._gloo = self._nccl = None
        del self._store  # with its port
