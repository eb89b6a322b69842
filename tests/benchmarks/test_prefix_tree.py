"""The tree of cached beginnings that `make stage6 trace` draws."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from benchmarks.plots.picture import save_picture
from benchmarks.plots.prefix_tree import prefix_tree_figure, runs_of
from benchmarks.prefixes import BLOCK, EXAMPLES, FOLLOW_UPS, QUESTIONS, SYSTEM, record_prefixes
from common.kv_cache import PrefixNode


def test_blocks_without_a_branch_are_drawn_as_one_node() -> None:
    """Two blocks in a row, then two that part, one of which goes on."""
    nodes = [PrefixNode(parent, (1, 2), hits, 0) for parent, hits in [(None, 5), (0, 5), (1, 3), (1, 1), (3, 0)]]
    [root] = runs_of(nodes)
    assert (root.start, root.end, root.hits) == (0, 2, [5, 5])
    assert [(child.start, child.end, child.hits) for child in root.children] == [(2, 3, [3]), (2, 4, [1, 0])]


def test_the_tree_of_the_scenario_is_that_of_its_prompts_and_is_not_blank(tmp_path: Path) -> None:
    nodes, hit_rate = record_prefixes("m6", "random:tiny-llama", "cpu", "float32")
    [root] = runs_of(nodes)
    requests = sum(QUESTIONS) + 2 * FOLLOW_UPS
    assert root.hits == [requests - 1] * (SYSTEM // BLOCK), "all but the first one share the system prompt"
    assert [child.hits[0] for child in root.children] == [n + FOLLOW_UPS - 1 for n in QUESTIONS]
    assert [len(child.hits) for child in root.children] == [length // BLOCK for length in EXAMPLES]
    assert 0.5 < hit_rate < 1
    picture = save_picture(tmp_path / "tree.png", lambda: prefix_tree_figure(nodes, hit_rate))
    assert np.std(matplotlib.image.imread(picture)) > 0.05
