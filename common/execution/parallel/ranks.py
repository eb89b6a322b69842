"""The processes of one engine, as one of them sees the others: collectives, messages, and whether all are alive."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError, one_line
from common.execution.parallel.interrupts import held_interrupts
from common.execution.parallel.split import Split
from common.execution.parallel.watch import Watch

PATIENCE = timedelta(seconds=30)  # with a rank that computes the same step
LOADING = timedelta(minutes=30)  # with one that reads its weights, or quantises them
FOREVER = timedelta(days=3650)  # until the next request comes
HEADER = 2048  # bytes of a message's first part
DIRECT = 1 << 18  # bytes up to which more than two ranks send a tensor to one another directly
TENSORS, MESSAGES = 0, 1  # tags


class Ranks:
    """Rank 0 leads: it schedules, and tells the others what to do. All call the same collectives in the same order.

    On GPUs these are NCCL's, on the current stream, so that CUDA graphs hold them. On CPUs each rank sends its part to
    the others over gloo, and all add in the same order: gloo's own all-reduce hands each call to another thread, and
    takes several times as long for what a decode step sums. `counts`: collectives so far; `seconds`: spent in them, on
    a CPU.
    """

    def __init__(
        self, split: Split, store: dist.Store, device: torch.device, watch: Watch | None = None, local_rank: int = 0,
        one_host: bool = True,
    ) -> None:  # fmt: skip
        """store: where the ranks find one another. local_rank: of those on this host. Waits for the others."""
        self.split, self.rank, self.size, self.local_rank = split, split.rank, split.size, local_rank
        self.counts, self.seconds = Counter[str](), 0.0
        self.on_close: list[Callable[[], None]] = []
        self._watch, self._store, self._lock = watch, store, threading.Lock()
        self._lost: str | None = None
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        options: Any = dist.ProcessGroupGloo._Options()  # pyright: ignore
        gloo: Any = dist.ProcessGroupGloo
        options._devices = [gloo.create_device(hostname="127.0.0.1") if one_host else gloo.create_default_device()]
        options._timeout, options._threads = LOADING, 1
        self._gloo: Any = gloo(dist.PrefixStore("gloo", store), self.rank, self.size, options)
        self._nccl: Any = None
        if device.type == "cuda":
            kind: Any = dist.ProcessGroupNCCL  # pyright: ignore
            self._nccl = kind(dist.PrefixStore("nccl", store), self.rank, self.size, kind.Options())
        self.note = f"{split.note}, {'NCCL' if self._nccl else 'gloo'}"

    # -- collectives of a step --------------------------------------------------------------------------------------

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """May be written over x."""
        return self._reduce(x.contiguous(), dist.ReduceOp.SUM)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduce(x.contiguous(), dist.ReduceOp.MAX)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x of every rank, in their order; all of the same shape."""
        x = x.contiguous()
        with self._counted("gather"):
            if self._nccl is None:
                return self._exchange(x)
            parts = x.new_empty(self.size, *x.shape)
            self._nccl._allgather_base(parts, x, self._now(dist.AllgatherOptions())).wait()
            return list(parts)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's, in the place of x."""
        with self._counted("broadcast"):
            if self._nccl is not None:
                self._nccl.broadcast([x], self._now(dist.BroadcastOptions())).wait()
            else:
                works = self._send(x, TENSORS) if self.rank == 0 else [self._gloo.recv([x], 0, TENSORS)]
                self._wait(works, PATIENCE)
        return x

    def _reduce(self, x: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        with self._counted("reduce"):
            if self._nccl is None and (self.size == 2 or x.nbytes <= DIRECT):
                parts = self._exchange(x)
                if operation is dist.ReduceOp.MAX:
                    return torch.stack(parts).amax(0)
                return parts[0] + parts[1] if self.size == 2 else torch.stack(parts).sum(0)
            options = dist.AllreduceOptions()
            options.reduceOp = operation  # pyright: ignore[reportAttributeAccessIssue]
            group = self._nccl or self._gloo
            group.allreduce([x], self._now(options)).wait()
            return x

    def _exchange(self, x: torch.Tensor, patience: timedelta = PATIENCE) -> list[torch.Tensor]:
        parts = [x if rank == self.rank else torch.empty_like(x) for rank in range(self.size)]
        works = self._send(x, TENSORS)
        works += [self._gloo.recv([parts[rank]], rank, TENSORS) for rank in self._others]
        self._wait(works, patience)
        return parts

    def _send(self, x: torch.Tensor, tag: int) -> list[Any]:
        return [self._gloo.send([x], rank, tag) for rank in self._others]

    @staticmethod
    def _wait(works: list[Any], patience: timedelta) -> None:
        for work in works:
            work.wait(patience)

    @staticmethod
    def _now(options: Any) -> Any:
        options.asyncOp = False  # on the current stream
        return options

    @contextmanager
    def _counted(self, kind: str) -> Generator[None]:
        self.counts[kind] += 1
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin

    # -- messages ---------------------------------------------------------------------------------------------------

    def least(self, *values: int) -> list[int]:
        """Of each of these, the smallest of any rank; waits as long as ranks take to load a model."""
        return torch.stack(self._exchange(torch.tensor(values), LOADING)).amin(0).tolist()

    def tell(self, message: bytes) -> None:
        """From rank 0 to all others; nothing: that it is over."""
        data = bytearray(len(message).to_bytes(8, "little") + message)
        data += bytes(max(0, HEADER - len(data)))
        for part in (data[:HEADER], data[HEADER:]):
            if part:
                self._wait(self._send(torch.frombuffer(part, dtype=torch.uint8), MESSAGES), PATIENCE)

    def hear(self) -> bytes:
        """The next message; waits for it."""
        head = self._receive(HEADER, FOREVER)
        length = int.from_bytes(head[:8], "little")
        rest = 8 + length - HEADER
        return (head + (self._receive(rest, PATIENCE) if rest > 0 else b""))[8 : 8 + length]

    def _receive(self, count: int, patience: timedelta) -> bytes:
        data = bytearray(count)
        self._wait([self._gloo.recv([torch.frombuffer(data, dtype=torch.uint8)], 0, MESSAGES)], patience)
        return bytes(data)

    # -- life and death ---------------------------------------------------------------------------------------------

    @property
    def lost(self) -> str | None:
        """Why no step can follow."""
        return self._lost or (self._watch.lost if self._watch else None)

    @contextmanager
    def together(self) -> Generator[None]:
        """What all ranks do: Ctrl-C waits until it is done, and an error ends the engine, since the others have gone
        on. `UserError` in one line; again for whatever is tried afterwards."""
        if self.lost is not None:
            self.close()
            raise UserError(self.lost)
        with held_interrupts():
            try:
                yield
            except Exception as error:
                raise self.fail(error) from error

    def fail(self, error: Exception) -> UserError:
        """End all ranks; returns what to raise: what a rank said before it left, rather than that it has left."""
        if self._watch is not None and not isinstance(error, UserError):
            self._watch.wait_for_news()
        late = f"a rank did not answer for {PATIENCE.seconds} s: the engine has ended, build a new one"
        other = late if "imed out" in str(error) else f"the ranks have lost each other: {one_line(error)[:120]}"
        self._lost = self.lost or (str(error) if isinstance(error, UserError) else other)
        self.close()
        return UserError(self._lost)

    def close(self) -> None:
        """End the others, and give back ports and processes. Closing twice is no error."""
        with self._lock:
            if self._gloo is None:
                return
            if self.rank == 0 and self.lost is None:
                with suppress(RuntimeError):
                    self.tell(b"")
            if self._watch is not None:
                self._watch.close(kill=self.lost is not None)
            self._lost = self.lost or "the engine is closed: build a new one"
            if self._nccl is not None:
                self._nccl.abort()
            self._gloo = self._nccl = self._store = None
            for act in self.on_close:
                act()
