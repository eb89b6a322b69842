"""A CPU's speed next to llama.cpp's (`python -m benchmarks cpu-speed`): tables, and ratios with a picture of them."""

import tomllib
from collections.abc import Iterator, Sequence

from matplotlib import pyplot as plt

from benchmarks.gpu import JOBS
from benchmarks.plots.picture import headed
from benchmarks.report.arithmetic import compute
from benchmarks.report.blocks import TEMPLATES, table
from benchmarks.report.claims import MET, NOT_MET, Claim
from benchmarks.report.figures import evaluate
from benchmarks.report.sources import Machine
from benchmarks.style import INK, WIDTH, color, title
from benchmarks.table import rate, speed

PARTS = [part.name for part in JOBS["cpu_speed"]]  # the files; the ratios are of the first
REACH = [Claim(**one) for one in tomllib.loads((TEMPLATES / "reach.toml").read_text(encoding="utf-8"))["claim"]]
Ratio = tuple[Claim, float, float]  # what was wanted: the least of it, and what was measured


def reached(machine: Machine) -> list[Ratio]:
    """The ratios that were measured there. Those of two files are written as `compute` has them."""
    values = [(claim, (compute if "<" in claim.figure else evaluate)(machine, claim.figure)) for claim in REACH]
    return [(claim, claim.low or 0.0, value) for claim, value in values if value is not None]


def cpu_blocks(machine: Machine) -> Iterator[str]:
    for bench in (bench for part in PARTS for bench in machine.file(part).benches):
        config = bench.results.config
        cells = {
            (r.stage, r.workload): rate(r.prompt_tokens_per_s) if r.workload == "prefill" else speed(r)
            for r in bench.results.records if r.ok
        }  # fmt: skip
        stages, workloads = config["contestants"], config["workloads"]
        rows = [[title(stage), *(cells.get((stage, name), "–") for name in workloads)] for stage in stages]
        caption = f"{machine.title}, {config['model']}, {config['dtype']}; `{machine.folder}/{bench.path.name}`"
        yield table(("tokens/s: output, of `prefill` prompts", *workloads), rows, caption=caption)
    verdicts = [(c, value, MET if value >= low else NOT_MET) for c, low, value in reached(machine)]
    if rows := [[c.said, c.expected, f"{value:.2f}×", verdict] for c, value, verdict in verdicts]:
        yield table(("output tokens/s", "wanted", "measured", "verdict"), rows, words=2)


def draw(found: Sequence[Ratio], where: str) -> plt.Figure:
    """A bar for each ratio, and the least that is wanted of it."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(found) + 1))
    for y, (claim, low, value) in enumerate(found):
        axis.barh(y, value, color=color(claim.stage), height=0.6)
        axis.plot([low, low], [y - 0.4, y + 0.4], color=INK, linewidth=2.5)
        axis.annotate(f"{value:.2f}×", (max(value, low), y), (8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(found)), [claim.said for claim, *_ in found])
    axis.set(ylim=(len(found) - 0.45, -0.55), xlim=(0, 1.12 * max(max(two) for _, *two in found)))
    finding = f"Speed on a CPU: {sum(v >= low for _, low, v in found)} of {len(found)} ratios are as high as was wanted"
    return headed(figure, finding, "Bar: ratio of two medians; black line: the least that is wanted.", where)
