"""What the report says, as blocks."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.report.blocks import TEXTS, Block, Picture, folded, table
from benchmarks.report.claims import CLAIMS, MET, NOT_MEASURED, NOT_MET, Claim, Verdict, judge
from benchmarks.report.cpu_speed import cpu_blocks
from benchmarks.report.execution import execution_blocks, peer_blocks
from benchmarks.report.figures import BEST_OF_4_BITS
from benchmarks.report.fill import Filler
from benchmarks.report.sheets import sheet_blocks
from benchmarks.report.sources import Bench, Machine
from benchmarks.style import title
from benchmarks.table import factor, footnotes, rows_for, size, sweep_rows, workload_rows
from benchmarks.workloads import find

LADDERS = ("mixed", "ladder", "nano")
KERNELS, QUALITY = ("attention", "limits", "batches", "other"), ("quality", "interop")
LADDER_COLUMNS = {
    **{name: name for name in ("stage", "output tokens/s", "× stage before", "× m0", "peak memory")},
    "TTFT, s p50": "TTFT p50, s",
    "ITL, ms p50 / p99": "ITL p50 / p99, ms",
    "KV mean use": "KV in use",
}
Judged = Mapping[str, Sequence[tuple[Claim, Verdict]]]  # all claims with their verdicts, by the machine's name


def report(
    machines: Sequence[Machine], filler_for: Mapping[str, Filler], pictures: Mapping[str, list[Picture]]
) -> list[Block]:
    """All of it: what is short and asked for first at the top, every table at the end."""
    judged = {m.name: [(claim, judge(claim, m, filler_for[m.name])) for claim in CLAIMS] for m in machines}
    blocks: list[Block] = ["# FoloVLLM: what was measured", _summary(machines, judged)]
    blocks += ["## Machines", _machines(machines), *filter(None, map(_spread, machines))]
    blocks += ["## The ladder", *(list(_ladders(machines, pictures)) or ["Not measured yet: run `make bench`."])]
    blocks += ["## Claims", *_claims(machines, judged)]
    blocks += ["## Peers", *_peers(machines)]
    speed = [block for machine in machines for block in cpu_blocks(machine)]
    blocks += ["## Speed on a CPU", *(speed or ["Not measured yet: run `python -m benchmarks cpu-speed`."])]
    execution = [block for machine in machines for block in execution_blocks(machine)]
    blocks += ["## Execution on a GPU", *(execution or ["Not measured yet: run `make gpu-bench`."])]
    blocks += ["## Kernels", *_sheets(machines, KERNELS)]
    quality = _sheets(machines, QUALITY) or ["Not measured yet: run `make stage7 quality`."]
    blocks += ["## Quality of 4-bit weights, and their checkpoints", *quality]
    blocks += ["## Pictures"]
    of_ladders = [f"{workload}-throughput.png" for workload in LADDERS]
    for machine in machines:
        shown = pictures[machine.name]  # those of the ladders stand there
        blocks += [f"### {_name(machine)}", *(p for p in shown if p.path.name.removeprefix("gpu-") not in of_ladders)]
    blocks += ["## Every workload", *_workloads(machines)]
    return [*blocks, "## Files, versions and commits", _files(machines)]


def _name(machine: Machine) -> str:
    return f"{machine.title} (`reports/{machine.folder}`)"


def _summary(machines: Sequence[Machine], judged: Judged) -> str:
    parts = [TEXTS["summary"]]
    for machine in machines:
        verdicts = [verdict.verdict for _, verdict in judged[machine.name]]
        missed = [f"{c.stage}, {c.said} ({v.value})" for c, v in judged[machine.name] if v.verdict == NOT_MET]
        measured = len(verdicts) - verdicts.count(NOT_MEASURED)
        said = f"**{machine.title}**: of {len(CLAIMS)} claims {measured} were measured and {verdicts.count(MET)} met."
        parts.append(said + (f" Not met: {'; '.join(missed)}." if missed else ""))
    return " ".join(parts)


def _machines(machines: Sequence[Machine]) -> str:
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
        rows.append([f"`reports/{machine.folder}`", gpu, cpu, "; ".join(models) or "–", files])
    return table(("folder", "GPU", "CPU", "model", "files"), rows, words=4)


def _spread(machine: Machine) -> str:
    """How far the same stage on the same workload and model is apart in two files of a folder, if by over a half."""
    speeds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for bench in machine.benches:
        for record in () if bench.results.config.get("options") else bench.results.records:
            if record.output_tokens_per_s and not bench.results.config.get("execution"):
                name = record.stage, record.workload, bench.results.config["model"]
                speeds[name].append(record.output_tokens_per_s)
    apart, name = max(((max(found) / min(found), name) for name, found in speeds.items()), default=(1.0, ("", "", "")))
    if apart < 1.5:
        return ""
    return TEXTS["spread"].format(folder=machine.folder, stage=name[0], workload=name[1], apart=apart)


def _ladders(machines: Sequence[Machine], pictures: Mapping[str, list[Picture]]) -> Iterator[Block]:
    for machine, workload in product(machines, LADDERS):
        if bench := machine.bench_of(workload):
            yield from (f"### {workload} on {machine.title}", *_workload(bench, workload, LADDER_COLUMNS))
            name = f"{machine.prefix}{workload}-throughput.png"
            yield from (picture for picture in pictures[machine.name] if picture.path.name == name)


def _workload(bench: Bench, workload: str, columns: Mapping[str, str] | None = None) -> list[str]:
    """Its table, and the notes below it. columns: those that are shown, and their headings here; None: all."""
    headings, rows = workload_rows(bench.results, workload)
    headers = [" ".join(heading.split()) for heading in headings]
    kept = [i for i, name in enumerate(headers) if columns is None or name in columns]
    names = [columns[headers[i]] if columns else headers[i] for i in kept]
    config, records = bench.results.config, rows_for(bench.results, workload)
    options = "".join(f", {name}={value}" for name, value in (config.get("options") or {}).items())
    what = f"{find(workload).description}. {config['model']}, {config['dtype']}{options}"
    caption = f"`{workload}`: {what}; `{bench.path.parent.name}/{bench.path.name}`"
    notes = footnotes(records, any(bench.results.plain_of(record) for record in records))
    found = table(names, [[row[i] for i in kept] for row in rows], caption=caption)
    return [found, ". ".join(notes) + "."] if notes else [found]


def _claims(machines: Sequence[Machine], judged: Judged) -> list[str]:
    blocks = [TEXTS["claims"]]
    headers = ("stage", "said", "shown by", "expected", "measured", "verdict", "why, and notes")
    for machine in machines:
        verdicts = judged[machine.name]
        measured = [(claim, found) for claim, found in verdicts if found.verdict != NOT_MEASURED]
        few = machine.folder != "local" and len(measured) < len(verdicts) / 2
        rows = [
            (c.stage, c.said, f"`{found.workload}`: {c.how}", c.expected, found.value, found.verdict, found.why)
            for c, found in (measured if few else verdicts)
        ]
        blocks += [f"### {_name(machine)}", table(headers, rows, words=len(headers))]
    return blocks


def _peers(machines: Sequence[Machine]) -> list[str]:
    rows: list[list[str]] = []
    for machine in machines:
        for bench in machine.benches:
            model = bench.results.config["model"]
            where = machine.title + (f", {model}" if model != machine.model else "")
            for record in bench.results.records:
                own = [r for r in rows_for(bench.results, record.workload) if r.ok and r.stage not in PEERS]
                own = [r for r in own if (r.stage == "m7") == (BEST_OF_4_BITS in record.stage)]
                if record.stage in PEERS and own:
                    best = max(own, key=lambda r: r.output_tokens_per_s or 0)
                    speeds = [f"{r.output_tokens_per_s:,.1f}" if r.ok else "failed" for r in (record, best)]
                    against = [title(best.stage), speeds[1], factor(best, record)]
                    rows.append([where, record.workload, title(record.stage), speeds[0], *against])
    headers = ("machine", "workload", "peer", "tokens/s", "our fastest in as many bits", "tokens/s", "× the peer")
    blocks = [table(headers, rows, words=3)] if rows else []
    return blocks + [block for machine in machines for block in peer_blocks(machine)]


def _sheets(machines: Sequence[Machine], kinds: Sequence[str]) -> list[str]:
    found = [(machine, sheet) for machine in machines for sheet in machine.sheets if sheet.kind in kinds]
    return [block for m, sheet in found for block in (f"### {sheet.path.stem} on {m.title}", *sheet_blocks(sheet))]


def _workloads(machines: Sequence[Machine]) -> Iterator[str]:
    for machine, bench in [(m, b) for m in machines for b in m.benches]:
        inner: list[str] = []
        for workload in dict.fromkeys(r.workload for r in bench.results.records):
            inner += _workload(bench, workload)
        for workload in dict.fromkeys(r.workload for r in bench.results.sweeps):
            inner.append(table(*sweep_rows(bench.results, workload), caption=f"sweep of `{workload}`"))
        yield folded(f"{machine.title}: {bench.path.name}", inner)


def _files(machines: Sequence[Machine]) -> str:
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
            rows.append([f"`{machine.folder}/{path.name}`", commit, text or "–", note])
        rows += [[f"`{machine.folder}`", "–", "–", f"left out: {reason}"] for reason in machine.left_out]
    return table(("file", "commit", "versions", "notes"), rows, words=4)
