"""Cached beginnings as a tree: from left to right in tokens, a box for each block, darker the more requests used it."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from benchmarks.plots.picture import headed
from benchmarks.style import INK, SOFT, WIDTH, color, title
from common.watch.kv_memory import PrefixNode


def children_of(nodes: Sequence[PrefixNode]) -> dict[int | None, list[int]]:
    """Numbers of the blocks behind each block; behind None those that a prompt can begin with."""
    children: dict[int | None, list[int]] = {}
    for number, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(number)
    return children


def places(nodes: Sequence[PrefixNode]) -> list[tuple[int, float]]:
    """Each block's depth and row: a row for each leaf, parents in the middle of their children."""
    children, found = children_of(nodes), [(0, 0.0)] * len(nodes)

    def place(number: int, depth: int, row: int) -> int:
        """Returns the first free row."""
        below, after = children.get(number, []), row
        for child in below:
            after = place(child, depth + 1, after)
        found[number] = depth, (found[below[0]][1] + found[below[-1]][1]) / 2 if below else row
        return max(after, row + 1)

    free = 0
    for root in children.get(None, []):
        free = place(root, 0, free)
    return found


def prefix_tree_figure(nodes: Sequence[PrefixNode], hit_rate: float) -> plt.Figure:
    children, placed = children_of(nodes), places(nodes)
    deepest, rows = max(depth for depth, _ in placed) + 1, max(row for _, row in placed) + 1
    size, most = len(nodes[0].tokens), max(node.hits for node in nodes) or 1
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.5 * rows))
    for number, (node, (depth, row)) in enumerate(zip(nodes, placed, strict=True)):
        left, end = depth * size, (depth + 1) * size
        look = {"facecolor": color("m6"), "alpha": 0.08 + 0.85 * node.hits / most, "linewidth": 0}
        axis.add_patch(Rectangle((left + 0.6, row - 0.33), size - 1.2, 0.66, **look))
        axis.text(left + size / 2, row, str(node.hits), ha="center", va="center", color=INK, fontsize=11)
        below = children.get(number, [])
        for child in below if len(below) > 1 else ():
            axis.plot([end - 0.6, end + 0.6], [row, placed[child][1]], color=SOFT, linewidth=1)
    axis.set(xlim=(-0.2 * size, (deepest + 0.2) * size), ylim=(rows - 0.4, -0.7), yticks=[])
    axis.set_xlabel("tokens from the beginning of the prompt")
    axis.spines["left"].set_visible(False)
    finding = f"{title('m6')}: {hit_rate:.0%} of all prompt tokens came from the cache, computed once for all"
    note = f"A box is a block of {size} tokens. The number: how many requests found it in the cache."
    return headed(figure, finding, note)
