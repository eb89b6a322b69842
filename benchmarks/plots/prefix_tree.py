"""Cached beginnings as a tree: from left to right in tokens, a box for each block, darker the more requests used it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.plots.picture import headed
from benchmarks.style import INK, SOFT, WIDTH, color, title
from common.kv_cache import PrefixNode


@dataclass
class Run:
    """Neighbouring blocks without a branch between them: one box of the picture, as one node of a radix tree."""

    start: int
    hits: list[int]
    children: list["Run"] = field(default_factory=list["Run"])
    row: float = 0.0

    @property
    def end(self) -> int:
        return self.start + len(self.hits)


def runs_of(nodes: Sequence[PrefixNode]) -> list[Run]:
    """The tree's first runs. A new run begins where a path parts."""
    children: dict[int | None, list[int]] = {}
    for number, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(number)

    def run(number: int, start: int) -> Run:
        hits = [nodes[number].hits]
        while len(below := children.get(number, [])) == 1:
            number = below[0]
            hits.append(nodes[number].hits)
        return Run(start, hits, [run(child, start + len(hits)) for child in below])

    return [run(number, 0) for number in children.get(None, [])]


def _place(runs: Sequence[Run], row: int = 0) -> int:
    """A row for each leaf, parents in the middle of their children; returns the first free row."""
    for one in runs:
        after = _place(one.children, row)
        one.row = (one.children[0].row + one.children[-1].row) / 2 if one.children else row
        row = max(after, row + 1)
    return row


def prefix_tree_figure(nodes: Sequence[PrefixNode], hit_rate: float) -> Figure:
    roots = runs_of(nodes)
    rows = _place(roots)
    most = max((node.hits for node in nodes), default=0)
    size = len(nodes[0].tokens)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.5 * rows))
    for root in roots:
        _draw(axis, root, size, most)
    depth = max((_deepest(root) for root in roots), default=1)
    axis.set(xlim=(-0.2 * size, (depth + 0.2) * size), ylim=(rows - 0.4, -0.7), yticks=[])
    axis.set_xlabel("tokens from the beginning of the prompt")
    axis.spines["left"].set_visible(False)
    finding = f"{title('m6')}: {hit_rate:.0%} of all prompt tokens came from the cache, computed once for all"
    note = f"A box is a block of {size} tokens. The number: how many requests found it in the cache."
    return headed(figure, finding, note)


def _deepest(run: Run) -> int:
    return max([run.end, *(_deepest(child) for child in run.children)])


def _draw(axis: Axes, run: Run, size: int, most: int) -> None:
    for offset, hits in enumerate(run.hits):
        left = (run.start + offset) * size
        share = hits / most if most else 0.0
        look = {"facecolor": color("m6"), "alpha": 0.08 + 0.85 * share, "linewidth": 0}
        axis.add_patch(Rectangle((left + 0.6, run.row - 0.33), size - 1.2, 0.66, **look))
        axis.text(left + size / 2, run.row, str(hits), ha="center", va="center", color=INK, fontsize=11)
    for child in run.children:
        end = run.end * size
        axis.plot([end - 0.6, end + 0.6], [run.row, child.row], color=SOFT, linewidth=1)
        _draw(axis, child, size, most)
