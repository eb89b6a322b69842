"""The tree of cached beginnings that `make stage6 trace` draws."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from benchmarks.plots.picture import save_picture
from benchmarks.plots.prefix_tree import children_of, places, prefix_tree_figure
from benchmarks.prefixes import BLOCK, EXAMPLES, FOLLOW_UPS, QUESTIONS, SYSTEM, record_prefixes
from common.watch.kv_memory import PrefixNode


def test_a_leaf_has_a_row_and_a_parent_is_in_the_middle() -> None:
    """Two blocks in a row, then two that part, one of which goes on."""
    nodes = [PrefixNode(parent, (1, 2), hits, 0) for parent, hits in [(None, 5), (0, 5), (1, 3), (1, 1), (3, 0)]]
    assert children_of(nodes) == {None: [0], 0: [1], 1: [2, 3], 3: [4]}
    assert places(nodes) == [(0, 0.5), (1, 0.5), (2, 0), (2, 1), (3, 1)]


def test_the_tree_of_the_scenario_is_that_of_its_prompts_and_is_not_blank(tmp_path: Path) -> None:
    nodes, hit_rate = record_prefixes("m6", "random:tiny-llama", "cpu", "float32")
    requests, system = sum(QUESTIONS) + 2 * FOLLOW_UPS, SYSTEM // BLOCK
    depths = [depth for depth, _ in places(nodes)]
    shared = [node.hits for node, depth in zip(nodes, depths, strict=True) if depth < system]
    assert shared == [requests - 1] * system, "all but the first one share the system prompt"
    tasks = [number for number, depth in enumerate(depths) if depth == system]
    assert [nodes[task].hits for task in tasks] == [n + FOLLOW_UPS - 1 for n in QUESTIONS]
    for task, length in zip(tasks, EXAMPLES, strict=True):
        path, children = [task], children_of(nodes)
        while len(below := children.get(path[-1], [])) == 1:
            path += below
        assert len(path) == length // BLOCK
    assert 0.5 < hit_rate < 1
    picture = save_picture(tmp_path / "tree.png", lambda: prefix_tree_figure(nodes, hit_rate))
    assert np.std(matplotlib.image.imread(picture)) > 0.05
