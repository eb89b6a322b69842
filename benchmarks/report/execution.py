"""What execution gains on a GPU, apart from the eight ideas: fused kernels, CUDA graphs, planning ahead."""

from benchmarks.execution import PLAIN, WAYS
from benchmarks.peers import PEERS
from benchmarks.record import Record
from benchmarks.report.blocks import TEXTS, table
from benchmarks.report.figures import evaluate
from benchmarks.report.peers import GREEDY, MODEL, SAME_WORK, SAMPLED
from benchmarks.report.sources import Machine
from benchmarks.style import title
from benchmarks.table import rate

WORKLOADS = ("decode_one", "decode", "nano")
NAMES = {
    PLAIN: "plain: kernel by kernel, PyTorch's own",
    "fused": "+ fused kernels",
    "graphs": "+ CUDA graphs",
    "overlap": "all of these, and the next step planned while this one runs (default)",
}


def execution_blocks(machine: Machine) -> list[str]:
    """A table of tokens per second: stages and ways to execute them by workload; nothing where nothing was measured."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for bench in machine.benches:
        config = bench.results.config
        options = config.get("options") or WAYS["overlap"]  # the default
        way = config.get("execution") or next((name for name, own in WAYS.items() if own == options), None)
        for record in bench.results.records:
            if way and record.ok and record.workload in WORKLOADS and record.stage not in PEERS:
                found.setdefault((record.stage, way), {}).setdefault(record.workload, record)
    if not found or not machine.is_gpu:
        return []
    order = sorted(found, key=lambda key: (key[0], list(NAMES).index(key[1])))
    rows = [[title(stage), NAMES[way], *_cells(found[stage, way])] for stage, way in order]
    headers = ("stage", "execution", *(f"{name}, tokens/s" for name in WORKLOADS), "ITL of decode_one, ms")
    blocks = [table(headers, rows, words=2, caption=f"{machine.title}, {machine.model}")]
    missing = [f"*{NAMES[way]}*" for way in NAMES if all(way != measured for _, measured in found)]
    if missing:
        command = "make gpu-bench" + (f" MODEL={machine.model}" if machine.model != MODEL else "")
        blocks.append(f"Not measured yet: {'; '.join(missing)} (`{command}`).")
    return blocks


def _cells(records: dict[str, Record]) -> list[str]:
    speeds = [rate(records[name].output_tokens_per_s) if name in records else "–" for name in WORKLOADS]
    gaps = records["decode_one"].itl_s if "decode_one" in records else None
    return [*speeds, f"{gaps['p50'] * 1e3:.2f}" if gaps else "–"]


def peer_blocks(machine: Machine) -> list[str]:
    """Engines that people use on such a GPU, and the stages between them, by temperature; nothing without a file."""
    if machine.peers is None:
        return []
    peers, values = machine.peers, machine.peers.values
    rows: list[list[str]] = []
    for temperature in (GREEDY, SAMPLED):
        for engine in peers.engines():
            speeds = [peers.speed(engine, workload, temperature) for workload in SAME_WORK]
            rows += [[f"{temperature:g}", peers.title(engine), *map(_speed, speeds)]] if any(speeds) else []
        for stage in ("m6", "m7") if temperature == GREEDY else ():
            own = [evaluate(machine, f"{workload}.{stage}.output_tokens_per_s") for workload in SAME_WORK]
            theirs = [peers.speed("vllm", workload, GREEDY) for workload in SAME_WORK]
            cells = [
                _speed(o) + (f" ({o / t:.0%} of vLLM)" if o and t else "") for o, t in zip(own, theirs, strict=True)
            ]
            rows += [[f"{GREEDY:g}", f"**{title(stage)}**", *cells]] if any(own) else []
    settings = "; ".join(f"*{name}*: {how}" for name, how in values["engines"].items())
    text = TEXTS["peers"].format(values=values, file=peers.path.name, folder=machine.folder, settings=settings)
    headers = ("temperature", "engine", *(f"{name}, output tokens/s" for name in SAME_WORK))
    return [text, table(headers, rows, words=2)]


def _speed(value: float | None) -> str:
    return f"{value:,.0f}" if value else "–"
