"""What the report says, as blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.report.blocks import Block, Folded, Heading, Paragraph, Picture, Table, from_rich
from benchmarks.report.claims import CLAIMS
from benchmarks.report.execution import execution_blocks, peer_blocks
from benchmarks.report.fill import Filler
from benchmarks.report.sheets import sheet_blocks
from benchmarks.report.sources import Bench, Machine, folder_of
from benchmarks.report.verdicts import MET, NOT_MEASURED, NOT_MET, judge
from benchmarks.style import title
from benchmarks.table import factor, footnotes, rows_for, size, sweep_table, workload_table
from benchmarks.workloads import find

LADDERS = ("mixed", "ladder", "nano")
KERNELS, QUALITY = ("attention", "limits", "other"), ("quality", "interop")
LADDER_COLUMNS = {
    "stage": "stage",
    "output tokens/s": "output tokens/s",
    "× stage before": "× stage before",
    "× m0": "× m0",
    "TTFT, s p50": "TTFT p50, s",
    "ITL, ms p50 / p99": "ITL p50 / p99, ms",
    "peak memory": "peak memory",
    "KV mean use": "KV in use",
}


def report(
    machines: Sequence[Machine], filler_for: Mapping[str, Filler], pictures: Mapping[str, list[Picture]]
) -> list[Block]:
    """All of it: what is short and asked for first at the top, every table at the end."""
    blocks: list[Block] = [Heading("FoloVLLM: what was measured", 1), Paragraph(_summary(machines, filler_for))]
    blocks += [Heading("Machines"), _machines(machines)]
    blocks += [Heading("The ladder"), *_ladders(machines, pictures)]
    blocks += [Heading("Claims"), *_claims(machines, filler_for)]
    blocks += [Heading("Peers"), *_peers(machines)]
    execution = [block for machine in machines for block in execution_blocks(machine)]
    blocks += [Heading("Execution on a GPU"), *(execution or [Paragraph("Not measured yet: run `make gpu-bench`.")])]
    blocks += [Heading("Kernels"), *_sheets(machines, KERNELS)]
    quality = _sheets(machines, QUALITY) or [Paragraph("Not measured yet: run `make stage7 quality`.")]
    blocks += [Heading("Quality of 4-bit weights, and their checkpoints"), *quality]
    blocks += [Heading("Pictures")]
    for machine in machines:
        blocks += [Heading(_name(machine), 3), *(p for p in pictures[machine.name] if not _of_ladder(p))]
    blocks += [Heading("Every workload"), *_workloads(machines)]
    return [*blocks, Heading("Files, versions and commits"), *_files(machines)]


def _name(machine: Machine) -> str:
    return f"{machine.title} (`reports/{folder_of(machine)}`)"


def _summary(machines: Sequence[Machine], filler_for: Mapping[str, Filler]) -> str:
    parts: list[str] = []
    for machine in machines:
        found = [(claim, judge(claim, machine, filler_for[machine.name])) for claim in CLAIMS]
        verdicts = [verdict.verdict for _, verdict in found]
        missed = [f"{c.stage}, {c.said} ({v.value})" for c, v in found if v.verdict == NOT_MET]
        measured = len(verdicts) - verdicts.count(NOT_MEASURED)
        said = f"**{machine.title}**: of {len(CLAIMS)} claims {measured} were measured and {verdicts.count(MET)} met."
        parts.append(said + (f" Not met: {'; '.join(missed)}." if missed else ""))
    text = (
        "Written by `make report` from the JSON files that the benchmarks left; the figures of other engines on a GPU "
    )
    text += "are from `reports/peers`. No figure is typed by hand. "
    return text + " ".join(parts)


def _machines(machines: Sequence[Machine]) -> Table:
    rows: list[list[str]] = []
    for machine in machines:
        found: list[dict[str, Any]] = [b.results.environment for b in machine.benches]
        found += [s.values["environment"] for s in machine.sheets if "environment" in s.values]
        if not found:
            continue
        hardware = found[0]["hardware"]
        models = dict.fromkeys(f"{b.results.config['model']}, {b.results.config['dtype']}" for b in machine.benches)
        cpu = f"{hardware['cpu']}, {hardware['cpu_cores']} cores, {size(hardware['memory_bytes'])}"
        files = str(len(machine.benches) + len(machine.sheets))
        gpu = str(hardware["gpu"] or "–")
        rows.append([f"`reports/{folder_of(machine)}`", gpu, cpu, "; ".join(models) or "–", files])
    return Table(("folder", "GPU", "CPU", "model", "files"), rows, words=4)


def _of_ladder(picture: Picture) -> bool:
    return picture.path.name.removeprefix("gpu-") in [f"{workload}-throughput.png" for workload in LADDERS]


def _ladders(machines: Sequence[Machine], pictures: Mapping[str, list[Picture]]) -> list[Block]:
    blocks: list[Block] = []
    for machine in machines:
        for workload in LADDERS:
            bench = machine.bench_of(workload)
            if bench is None:
                continue
            table = from_rich(workload_table(bench.results, workload))
            kept = [i for i, name in enumerate(table.headers) if name in LADDER_COLUMNS]
            headers = [LADDER_COLUMNS[table.headers[i]] for i in kept]
            rows = [[row[i] if i < len(row) else "" for i in kept] for row in table.rows]
            blocks.append(Heading(f"{workload} on {machine.title}", 3))
            blocks.append(Table(headers, rows, caption=_caption(bench, workload)))
            blocks += _notes(bench, workload)
            blocks += [p for p in pictures[machine.name] if p.path.name == f"{machine.prefix}{workload}-throughput.png"]
    return blocks or [Paragraph("Not measured yet: run `make bench`.")]


def _caption(bench: Bench, workload: str) -> str:
    config = bench.results.config
    options = ", ".join(f"{name}={value}" for name, value in (config.get("options") or {}).items())
    what = f"{find(workload).description}. {config['model']}, {config['dtype']}{options and f', {options}'}"
    return f"`{workload}`: {what}; `{bench.path.parent.name}/{bench.path.name}`"


def _notes(bench: Bench, workload: str) -> list[Block]:
    records = rows_for(bench.results, workload)
    notes = footnotes(records, any(bench.results.plain_of(record) for record in records))
    return [Paragraph(". ".join(notes) + ".")] if notes else []


def _claims(machines: Sequence[Machine], filler_for: Mapping[str, Filler]) -> list[Block]:
    intro = (
        "What the interview questions and the plan behind this repository said that each idea would gain, next to what "
        "was measured. A claim that is exceeded counts as met. Of a machine that measured few, those are listed alone."
    )
    blocks: list[Block] = [Paragraph(intro)]
    for machine in machines:
        rows: list[list[str]] = []
        verdicts = [(claim, judge(claim, machine, filler_for[machine.name])) for claim in CLAIMS]
        measured = [(claim, found) for claim, found in verdicts if found.verdict != NOT_MEASURED]
        few = folder_of(machine) != "local" and len(measured) < len(verdicts) / 2
        for claim, found in measured if few else verdicts:
            where = f"`{found.workload}`: {claim.how}"
            rows.append([claim.stage, claim.said, where, claim.expected, found.value, found.verdict, found.why])
        headers = ("stage", "said", "shown by", "expected", "measured", "verdict", "why, and notes")
        blocks += [Heading(_name(machine), 3), Table(headers, rows, words=len(headers))]
    return blocks


def _peers(machines: Sequence[Machine]) -> list[Block]:
    rows: list[list[str]] = []
    for machine in machines:
        for bench in machine.benches:
            for record in bench.results.records:
                own = [r for r in rows_for(bench.results, record.workload) if r.ok and r.stage not in PEERS]
                if record.stage in PEERS and own:
                    best = max(own, key=lambda r: r.output_tokens_per_s or 0)
                    speeds = [f"{r.output_tokens_per_s:,.1f}" if r.ok else "failed" for r in (record, best)]
                    against = [title(best.stage), speeds[1], factor(best, record)]
                    rows.append([machine.title, record.workload, title(record.stage), speeds[0], *against])
    headers = ("machine", "workload", "peer", "output tokens/s", "our fastest", "output tokens/s", "× the peer")
    blocks: list[Block] = [Table(headers, rows, words=3)] if rows else []
    for machine in machines:
        blocks += peer_blocks(machine)
    return blocks


def _sheets(machines: Sequence[Machine], kinds: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for machine in machines:
        for sheet in machine.sheets:
            if sheet.kind in kinds:
                blocks += [Heading(f"{sheet.path.stem} on {machine.title}", 3), *sheet_blocks(sheet)]
    return blocks


def _workloads(machines: Sequence[Machine]) -> list[Block]:
    blocks: list[Block] = []
    for machine in machines:
        for bench in machine.benches:
            inner: list[Block] = []
            for workload in dict.fromkeys(r.workload for r in bench.results.records):
                table = from_rich(workload_table(bench.results, workload))
                inner += [Table(table.headers, table.rows, caption=_caption(bench, workload))]
                inner += _notes(bench, workload)
            for workload in dict.fromkeys(r.workload for r in bench.results.sweeps):
                table = from_rich(sweep_table(workload, [r for r in bench.results.sweeps if r.workload == workload]))
                inner += [Table(["point", *table.headers[1:]], table.rows, caption=f"sweep of `{workload}`")]
            blocks.append(Folded(f"{machine.title}: {bench.path.name}", inner))
    return blocks


def _files(machines: Sequence[Machine]) -> list[Block]:
    rows: list[list[str]] = []
    for machine in machines:
        for path, values in [(b.path, b.results.environment) for b in machine.benches] + [
            (s.path, s.values.get("environment") or {"versions": s.values.get("versions")}) for s in machine.sheets
        ]:
            versions = values.get("versions") or {}
            names = ("python", "torch", "triton", "transformers")
            changed = {True: "with uncommitted changes", False: "", None: "unknown tree"}
            state = changed[values.get("uncommitted_changes")] if "commit" in values else ""
            note = "; ".join(part for part in (state, values.get("note"), values.get("commit_note")) if part)
            text = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
            commit = str(values.get("commit") or "–")[:10]
            rows.append([f"`{folder_of(machine)}/{path.name}`", commit, text or "–", note])
        rows += [[f"`{folder_of(machine)}`", "–", "–", f"left out: {reason}"] for reason in machine.left_out]
    return [Table(("file", "commit", "versions", "notes"), rows, words=4)]
