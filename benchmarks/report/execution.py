"""What execution gains on a GPU, apart from the eight ideas: fused kernels, CUDA graphs, planning ahead."""

from __future__ import annotations

from typing import Any

from benchmarks.execution import PLAIN, WAYS
from benchmarks.peers import PEERS
from benchmarks.record import Record
from benchmarks.report import reference
from benchmarks.report.blocks import Block, Paragraph, Table
from benchmarks.report.sources import Machine, folder_of
from benchmarks.style import title
from benchmarks.table import rate

WORKLOADS = ("decode_one", "decode", "nano")
NAMES = {
    PLAIN: "plain: kernel by kernel, PyTorch's own",
    "fused": "+ fused kernels",
    "graphs": "+ CUDA graphs",
    "overlap": "all of these, and the next step planned while this one runs (default)",
}


def execution_blocks(machine: Machine) -> list[Block]:
    """A table of tokens per second: stages and ways to execute them by workload; nothing where nothing was measured."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for bench in machine.benches:
        way = bench.results.config.get("execution") or way_of(bench.results.config.get("options") or {})
        for record in bench.results.records:
            if way and record.ok and record.workload in WORKLOADS and record.stage not in PEERS:
                found.setdefault((record.stage, way), {}).setdefault(record.workload, record)
    if not found or not machine.is_gpu:
        return []
    order = sorted(found, key=lambda key: (key[0], list(NAMES).index(key[1])))
    rows = [[title(stage), NAMES[way], *_cells(found[stage, way])] for stage, way in order]
    headers = ("stage", "execution", *(f"{name}, tokens/s" for name in WORKLOADS), "ITL of decode_one, ms")
    blocks: list[Block] = [Table(headers, rows, words=2, caption=f"{machine.title}, {machine.model}")]
    missing = [f"*{NAMES[way]}*" for way in NAMES if all(way != measured for _, measured in found)]
    if missing:
        command = "make gpu-bench" + (f" MODEL={machine.model}" if machine.model != reference.MODEL else "")
        blocks.append(Paragraph(f"Not measured yet: {'; '.join(missing)} (`{command}`)."))
    return blocks


def way_of(options: dict[str, Any]) -> str | None:
    """Which line of the ablation an engine with these options is; None if it is none of them."""
    if not options:
        return "overlap"
    return next((way for way, settings in WAYS.items() if settings == options), None)


def _cells(records: dict[str, Record]) -> list[str]:
    speeds = [rate(records[name].output_tokens_per_s) if name in records else "–" for name in WORKLOADS]
    gaps = records["decode_one"].itl_s if "decode_one" in records else None
    return [*speeds, f"{gaps['p50'] * 1e3:.2f}" if gaps else "–"]


def peer_rows(machine: Machine) -> list[list[str]]:
    """Where the reference engines were measured on such a machine: the best of our stages, as a row next to them."""
    values: dict[str, dict[str, float]] = {}
    for bench in machine.benches:
        hardware, config = bench.results.environment["hardware"], bench.results.config
        if reference.GPU not in str(hardware["gpu"]) or config["model"] != reference.MODEL or config.get("options"):
            continue
        for record in bench.results.records:
            if record.ok and record.workload in WORKLOADS and record.stage not in PEERS:
                values.setdefault(record.stage, {})[record.workload] = record.output_tokens_per_s or 0
    vllm = reference.PEERS[reference.SHORT["vllm"]]
    return [
        [f"**{title(stage)}** (`reports/{folder_of(machine)}`)"]
        + [f"{speeds[w]:,.0f} ({speeds[w] / vllm[w]:.0%} of vLLM)" if w in speeds else "–" for w in reference.WORKLOADS]
        for stage, speeds in sorted(values.items())
    ]
