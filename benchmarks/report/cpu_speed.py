"""A CPU's speed next to llama.cpp's, from `python -m benchmarks cpu-speed`: tables, and ratios with a picture of them."""

import tomllib
from collections.abc import Iterator, Sequence

from matplotlib import pyplot as plt

from benchmarks.gpu import JOBS
from benchmarks.plots.picture import headed
from benchmarks.record import Record
from benchmarks.report.arithmetic import compute
from benchmarks.report.blocks import TEMPLATES, table
from benchmarks.report.claims import MET, NOT_MET, Claim
from benchmarks.report.figures import evaluate
from benchmarks.report.sources import Machine
from benchmarks.style import INK, SOFT, WIDTH, color, title
from benchmarks.table import rate

PARTS = [part.name for part in JOBS["cpu_speed"]]  # the files; the ratios are of the first
REACH = [Claim(**one) for one in tomllib.loads((TEMPLATES / "reach.toml").read_text(encoding="utf-8"))["claim"]]


def reached(machine: Machine) -> list[tuple[Claim, float]]:
    """The ratios that were measured there. Those of two files are written as `compute` has them."""
    values = [(claim, (compute if "<" in claim.figure else evaluate)(machine, claim.figure)) for claim in REACH]
    return [(claim, value) for claim, value in values if value is not None]


def cpu_blocks(machine: Machine) -> Iterator[str]:
    for bench in (bench for part in PARTS for bench in machine.file(part).benches):
        config = bench.results.config
        records = {(r.stage, r.workload): r for r in bench.results.records if r.ok}
        rows = [
            [title(stage), *(_speed(records.get((stage, workload))) for workload in config["workloads"])]
            for stage in config["contestants"]
        ]
        caption = f"{machine.title}, {config['model']}, {config['dtype']}: output tokens/s, of `prefill` prompt tokens/s"
        yield table(("", *config["workloads"]), rows, caption=f"{caption}; `{machine.folder}/{bench.path.name}`")
    if rows := [[c.said, c.expected, f"{v:.2f}×", verdict(c, v)] for c, v in reached(machine)]:
        yield table(("output tokens/s", "wanted", "measured", "verdict"), rows, words=2)


def _speed(record: Record | None) -> str:
    prompts = record is not None and record.workload == "prefill"
    return rate(record and (record.prompt_tokens_per_s if prompts else record.output_tokens_per_s))


def verdict(claim: Claim, value: float) -> str:
    return MET if value >= (claim.low or 0.0) else NOT_MET


def draw(found: Sequence[tuple[Claim, float]], where: str) -> plt.Figure:
    """A bar for each ratio, and the least that is wanted of it."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(found) + 1))
    for y, (claim, value) in enumerate(found):
        axis.barh(y, value, color=color(claim.stage), height=0.6)
        axis.plot([claim.low, claim.low], [y - 0.4, y + 0.4], color=INK, linewidth=2.5)
        axis.annotate(f"{value:.2f}×", (max(value, claim.low or 0.0), y), (8, 0), textcoords="offset points", va="center")
    axis.axvline(1, color=SOFT, linewidth=1, linestyle=":")
    axis.set_yticks(range(len(found)), [claim.said for claim, _ in found])
    axis.set(ylim=(len(found) - 0.45, -0.55), xlim=(0, 1.12 * max(max(value, c.low or 0.0) for c, value in found)))
    met = sum(verdict(claim, value) == MET for claim, value in found)
    finding = f"Ratios of tokens per second on a CPU: {met} of {len(found)} are as high as was wanted"
    return headed(figure, finding, "Bar: ratio of two medians of one file; black line: the least that is wanted.", where)
