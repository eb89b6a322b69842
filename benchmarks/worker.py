"""Runs one contestant on one workload, in a process of its own: `python -m benchmarks.worker`.

The job comes as one line of JSON on standard input; progress goes to standard output, a marked line of JSON each; the
record goes to the file that the job names. When standard input closes, the parent is gone, and the worker ends too.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestant import Contestant, OnTokens, Setting
from benchmarks.execution import PLAIN
from benchmarks.failure import of_error
from benchmarks.files import write_json
from benchmarks.measure import gpu_utilization
from benchmarks.peers import PEERS, build_peer
from benchmarks.recipes import BenchRequest, timed, total_output, warm
from benchmarks.record import Record, Run, record_runs
from benchmarks.stage_contestant import StageContestant
from benchmarks.workloads import Size, find, find_size
from common.errors import UserError
from common.watch.peak_memory import ActivationPeak, peak_memory, reset_peak_memory
from common.watch.progress import listening

MARK = "@bench "
WARMUP_TOKENS = {"cpu": 4, "gpu": 16, "quick": 2}


@dataclass(frozen=True)
class Job:
    """The order to a worker. `preset` is `cpu`, `gpu` or `quick`; `options` override the workload's engine options."""

    stage: str
    workload: str
    preset: str
    model: str
    dtype: str
    device: str
    repeats: int
    variant: str | None = None
    note: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    execution: str | None = None  # the row's way, where it is not the default
    result_path: str = ""

    def failed(self, why: str) -> Record:
        plain = self.execution == PLAIN
        return Record.failed(self.stage, self.workload, why, variant=self.variant, note=self.note, plain=plain)


def tell(**message: Any) -> None:
    print(MARK + json.dumps(message), flush=True)


class Progress:
    """Tells the parent ten times a second at most."""

    def __init__(self, total: int = 0) -> None:
        self._total, self._done, self._last = total, 0, 0.0

    def tokens(self, count: int) -> None:
        """`count` more have come, of `total` over all repeats."""
        self._done += count
        self._tell(done=self._done, total=self._total)

    def loading(self, what: str, done: int, total: int) -> None:
        """What the loading of a model says: m7's quantising, the first time, takes minutes."""
        if total:
            self._tell(phase=what, done=done, total=total)
        else:
            tell(line=what)

    def _tell(self, *, done: int, total: int, **more: str) -> None:
        now = time.monotonic()
        if now - self._last > 0.1 or done >= total:
            self._last = now
            tell(**more, done=done, total=total)


def run_job(job: Job) -> Record:
    """Build the contestant, warm it up, run the workload `repeats` times; the record is that of the median run."""
    size = find_size(job.workload, job.variant, job.preset)
    if job.stage in PEERS and find(job.workload).stages_only:
        raise UserError(f"not applicable: {job.workload} follows the tokens of a run, which peers do not tell in time")
    tell(phase="loading")
    setting = Setting.of(job.model, job.dtype, job.device, size, job.options)
    with listening(Progress().loading):
        contestant = build_contestant(job, setting)
    try:
        tell(phase="warming up")
        warm_up(contestant, size, WARMUP_TOKENS[job.preset])
        reset_peak_memory()
        progress = Progress(job.repeats * total_output(timed(size.requests(contestant.vocab_size))))

        def started(repeat: int) -> None:
            tell(phase=f"run {repeat} of {job.repeats}" if job.repeats > 1 else "running")

        with gpu_utilization(setting.device) as use:
            requests, runs = timed_runs(contestant, size, job.repeats, started, progress.tokens)
        record = record_runs(job.stage, job.workload, requests, runs)
        record.variant, record.plain = job.variant, job.execution == PLAIN
        record.note = "; ".join(note for note in (job.note, contestant.note) if note) or None
        record.peak_memory_bytes, record.peak_device_memory_bytes = peak_memory()
        record.gpu_utilization = sum(use) / len(use) if use else None
        if find(job.workload).probed:
            tell(phase="measuring attention and activations")
            again = size.requests(contestant.vocab_size, run=job.repeats + 1)
            record.attention_time_s, record.peak_activation_bytes = probe(contestant, again, setting.device)
        return record
    finally:
        contestant.close()


def probe(
    contestant: Contestant, requests: Sequence[BenchRequest], device: torch.device
) -> tuple[float | None, int | None]:
    """Seconds in attention and bytes of activations at their peak, over one more run: watching costs time (a clock at
    every layer, on a GPU two events), so the timed runs go without. None: not known here."""
    clock, memory = contestant.attention_clock(), ActivationPeak(device)
    with memory, clock or contextlib.nullcontext():
        contestant.run(requests, lambda tokens: None)
    return clock.seconds() if clock else None, memory.bytes


def warm_up(contestant: Contestant, size: Size, tokens: int) -> None:
    """One batch of the workload's own prompts, a few tokens each, all at once."""
    batch = timed(size.requests(contestant.vocab_size, run=0))[: size.max_num_seqs]
    contestant.run([BenchRequest(r.prompt, min(tokens, r.max_tokens)) for r in batch], lambda tokens: None)


def timed_runs(
    contestant: Contestant, size: Size, repeats: int, started: Callable[[int], None], progress: OnTokens
) -> tuple[list[BenchRequest], list[Run]]:
    """Run a workload `repeats` times on a contestant that is warm; returns the last run's requests, and all runs.
    `started` is called with the number of each run."""
    runs: list[Run] = []
    requests: list[BenchRequest] = []
    for repeat in range(1, repeats + 1):
        started(repeat)
        everything = size.requests(contestant.vocab_size, run=repeat)
        requests = timed(everything)
        if warm(everything):
            contestant.run(warm(everything), lambda tokens: None)
        runs.append(contestant.run(requests, progress))
        check_lengths(requests, runs[-1])
    return requests, runs


def build_contestant(job: Job, setting: Setting) -> Contestant:
    return build_peer(job.stage, setting) if job.stage in PEERS else StageContestant(job.stage, setting)


def check_lengths(requests: list[BenchRequest], run: Run) -> None:
    """A contestant that generates less than it was asked for would look fast."""
    for index, (request, timeline) in enumerate(zip(requests, run.timelines, strict=True)):
        made = len(timeline.token_times)
        if made != request.max_tokens:
            raise RuntimeError(f"request {index} got {made} tokens instead of {request.max_tokens}")


def end_with_parent() -> None:
    """Leave at once when standard input closes: the parent has died, or wants this process gone."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def die_first() -> None:
    """Out of memory, the system shall kill this process and not the one that keeps the results."""
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    end_with_parent()
    die_first()
    try:
        record = run_job(job)
    except Exception as error:  # the other contestants go on
        record = job.failed(of_error(error))
        if not isinstance(error, ValueError):
            traceback.print_exc()
    write_json(job.result_path, record.to_json())
    sys.stdout.flush()
    os._exit(0)  # libraries of peers may hold threads that never end


if __name__ == "__main__":
    main()
