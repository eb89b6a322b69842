"""Output tokens per second of every stage."""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.environment import ROOT, short_hardware
from benchmarks.plots.bars import bars, figure_with_rows, finish, headline, measured, name_rows, row_notes, runs_of
from benchmarks.record import Record
from benchmarks.report.peers import GREEDY, MODEL, SAME_WORK, SAMPLED, read_peers
from benchmarks.style import INK, color, title
from benchmarks.table import DASH, factor, rate
from benchmarks.workloads import find

NAMES = {GREEDY: "\n(greedy)", SAMPLED: f"\n(temperature {SAMPLED})"}


def throughput(results: Results, workload: str) -> plt.Figure | None:
    records = measured(results, workload)
    if not records or find(workload).columns == "prefill":  # which is not about output tokens
        return None
    records += (peers := list(_peers(results, workload)))
    first = records[0]
    plain = {record.stage: results.plain_of(record) for record in records}

    def label(record: Record) -> str:
        both = [one for one in (plain[record.stage], record) if one is not None]
        gains = [gain for one in both if (gain := factor(one, first)) != DASH]
        speeds = " → ".join(rate(one.output_tokens_per_s) for one in both)
        return speeds + (f"  ({' → '.join(gains)}×)" if gains else "")

    figure, (axis,) = figure_with_rows(1, len(records))
    bars(axis, records, workload, lambda r: r.output_tokens_per_s, lambda r: max(r.output_tokens_per_s_repeats), label)
    for row, record in enumerate(records):
        if (alone := plain[record.stage]) is not None:  # over the bar: what of it is execution's
            left, whole = alone.output_tokens_per_s or 0, record.output_tokens_per_s or 0
            rest = {"height": 0.62, "facecolor": "white", "edgecolor": color(record.stage), "linewidth": 1.2}
            axis.barh(row, max(0.0, whole - left), left=left, hatch="////", **rest)
        if len(runs := record.output_tokens_per_s_repeats) > 1:
            axis.plot([min(runs), max(runs)], [row, row], "|-", color=INK, linewidth=1.4, markersize=9)
    name_rows(axis, records, workload)
    axis.set_title("output tokens per second (more is better)", loc="left")
    runs = runs_of(records)
    how = f"Bar: {runs}" + ("." if runs == "one run" else "; line: slowest to fastest.")
    if len(records) > 1:
        how += f" In brackets: times {title(first.stage)}"
        how += ", ≈ where that ran another workload." if any(r.workload != first.workload for r in records) else "."
    if any(plain.values()):
        how += " Hatched: what execution adds (fused or compiled kernels, CUDA graphs, planning ahead)."
    if peers:
        how += " Grey: other engines, requests of the same kind, measured apart (reports/peers)."
    how += row_notes(results, records, workload)
    return finish(figure, results, workload, records, _finding(results, records, peers), how)


def _peers(results: Results, workload: str) -> Iterator[Record]:
    """Other engines' rows on the same GPU: greedy as the stages run, sampled where there is no greedy run."""
    known = workload in SAME_WORK and results.config["model"] == MODEL
    gpu = short_hardware(results.environment, results.config["device"])
    peers = read_peers(ROOT / "reports/peers", gpu) if known else None
    for engine in (engine for engine in (peers.engines() if peers else ()) if " (" not in engine):  # not its other ways
        for temperature, end in NAMES.items():
            if peers and (speed := peers.speed(engine, workload, temperature)):
                name = peers.title(engine) + end
                yield Record(name, workload, output_tokens_per_s=speed, output_tokens_per_s_repeats=[speed])
                break


def _finding(results: Results, records: list[Record], peers: list[Record]) -> str:
    """The fastest idea alone against the first stage; what execution adds to it is said apart. Beside greedy engines
    the fastest stage as it runs by default, against the fastest of them."""

    def speed(record: Record) -> float:
        return record.output_tokens_per_s or 0.0

    if rivals := [r for r in peers if r.stage.endswith(NAMES[GREEDY])]:
        ours = [r for r in records[: -len(peers)] if r.stage != "m7"]  # in 16 bits, as theirs
        first, best = max(rivals, key=speed), max(ours or records, key=speed)
        whole, name, other = best, f"{best.stage} with execution", first.stage.removesuffix(NAMES[GREEDY])
    elif said := headline(results, records, lambda r: -speed(r)):
        first, best, whole, name = said
        other = title(first.stage)
    else:
        return f"{title(records[0].stage)}: {rate(records[0].output_tokens_per_s)} output tokens per second"

    def gain(record: Record) -> str:
        times = speed(record) / (speed(first) or 1.0)
        form = ".2f" if times < 2 else ".1f" if times < 10 else ".0f"
        return f"{'' if first.workload == record.workload else 'about '}{times:{form}} times"

    finding = f"{name} generates {gain(best)} as many tokens per second as {other}"
    return finding + ("" if whole is best else f"; with execution {gain(whole)}")
