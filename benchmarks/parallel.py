"""One device against the same engine over ranks: on a CPU one process of all threads, and processes that share them."""

from typing import Annotated, Any

import typer

from benchmarks import cli
from benchmarks.contestant import Setting
from benchmarks.sheet import print_table, write_sheet
from benchmarks.stage_contestant import StageContestant
from benchmarks.worker import warm_up
from benchmarks.workloads import find_size, preset_of
from common.config import DEFAULT_MODEL, parse_device

STAGE, WORKLOADS, REPEATS = "m6", ("single", "mixed"), 3


def run(
    model: cli.Model = DEFAULT_MODEL, device: cli.Device = "cpu", dtype: cli.Dtype = "fp32", path: cli.JsonFile = None,
    quick: cli.Quick = False, ranks: Annotated[int, typer.Option(min=2, help="Ranks to compare with one.")] = 2,
) -> dict[str, Any]:  # fmt: skip
    """Compare tensor parallelism with one device: speed, bytes of a rank, and the share of communication."""
    path, _ = cli.places(path, None, "parallel.json")
    records = [measure(name, model, device, dtype, quick, n) for name in WORKLOADS for n in (1, ranks)]
    config = {"stage": STAGE, "model": model, "device": device, "dtype": dtype, "repeats": REPEATS}
    headings = ["workload", "ranks", "tokens/s", "weights MB", "KV MB", "communication", "collectives a step"]
    cells = [
        [r["workload"], str(r["ranks"]), f"{r['output_tokens_per_s']:.1f}", f"{r['weights_bytes'] / 1e6:.1f}",
         f"{r['kv_pool_bytes'] / 1e6:.1f}", f"{r['communication_share']:.0%}", f"{r['collectives_per_step']:.0f}"]
        for r in records
    ]  # fmt: skip
    print_table(f"{STAGE} over ranks: {model}, {dtype}, {device}; bytes: of the first", headings, cells)
    print(f"wrote {path}")
    return write_sheet(path, "parallel-1", config, records)


def measure(workload: str, model: str, device: str, dtype: str, quick: bool, ranks: int) -> dict[str, Any]:
    """The median run. communication_share: of its time, what the first rank spends in collectives, waiting included."""
    size = find_size(workload, None, preset_of(parse_device(device).type, quick))
    contestant = StageContestant(STAGE, Setting.of(model, dtype, device, size, {"tensor_parallel_size": ranks}))
    engine, together, runs = contestant.engine, contestant.engine.config.ranks, list[tuple[float, float, float]]()
    try:
        warm_up(contestant, size, 4)
        for repeat in range(REPEATS):
            before = (together.seconds, together.counts.total()) if together else (0.0, 0)
            found = contestant.run(size.requests(contestant.vocab_size, run=repeat + 1), lambda tokens: None)
            after = (together.seconds, together.counts.total()) if together else (0.0, 0)
            steps = int(engine.metrics()["steps"] or 1)
            share, calls = (after[0] - before[0]) / found.duration, (after[1] - before[1]) / steps
            runs.append((found.output_tokens_per_s, share, calls))
        speed, share, calls = sorted(runs)[REPEATS // 2]
        return {
            "workload": workload, "ranks": ranks, "output_tokens_per_s": speed, "communication_share": share,
            "output_tokens_per_s_repeats": [one for one, _, _ in runs], "collectives_per_step": calls,
            "weights_bytes": engine.runner.model.weights_bytes(), "kv_pool_bytes": engine.runner.attention.kv_bytes(),
        }  # fmt: skip
    finally:
        contestant.close()
