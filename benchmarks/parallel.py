"""One process of all of a CPU's threads against two that share them, and each layer, by tensor parallelism."""

from contextlib import closing
from typing import Any

from benchmarks import cli
from benchmarks.contestant import Setting
from benchmarks.sheet import print_table, write_sheet
from benchmarks.stage_contestant import StageContestant
from benchmarks.worker import warm_up
from benchmarks.workloads import find_size, preset_of
from common.config import DEFAULT_MODEL, parse_device

STAGE, REPEATS = "m6", 3


def run(
    model: cli.Model = DEFAULT_MODEL, device: cli.Device = "cpu", dtype: cli.Dtype = "fp32", path: cli.JsonFile = None,
    quick: cli.Quick = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare two ranks of tensor parallelism with one device: speed, bytes of a rank, share of communication."""
    path, _ = cli.places(path, None, "parallel.json")
    records = [measure(name, model, device, dtype, quick, n) for name in ("single", "mixed") for n in (1, 2)]
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in r.values()] for r in records]
    print_table(f"{STAGE}, {model}, {dtype}, {device}", [name.replace("_", " ") for name in records[0]], cells)
    config = {"stage": STAGE, "model": model, "device": device, "dtype": dtype, "repeats": REPEATS}
    return write_sheet(path, "parallel-1", config, records)


def measure(workload: str, model: str, device: str, dtype: str, quick: bool, ranks: int) -> dict[str, Any]:
    """Bytes are the first rank's, and so is communication: the share of time in collectives, waiting included."""
    size = find_size(workload, None, preset_of(parse_device(device).type, quick))
    setting = Setting.of(model, dtype, device, size, {"tensor_parallel_size": ranks})
    with closing(StageContestant(STAGE, setting)) as one:
        runner, joined = one.engine.runner, one.engine.config.ranks
        warm_up(one, size, 4)
        before = (joined.seconds, joined.counts.total()) if joined else (0.0, 0)
        runs = [one.run(size.requests(one.vocab_size, run=n + 1), lambda tokens: None) for n in range(REPEATS)]
        seconds, calls = (joined.seconds - before[0], joined.counts.total() - before[1]) if joined else (0.0, 0)
        return {
            "workload": workload, "ranks": ranks,
            "output_tokens_per_s": sorted(run.output_tokens_per_s for run in runs)[REPEATS // 2],
            "weights_bytes": runner.model.weights_bytes(), "kv_pool_bytes": runner.attention.kv_bytes(),
            "communication_share": seconds / sum(run.duration for run in runs),
            "collectives_per_step": calls / sum(int(run.metrics["steps"] or 0) for run in runs),
        }  # fmt: skip
