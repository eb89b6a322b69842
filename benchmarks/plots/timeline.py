"""Requests down, steps across: what each step did for each request, and which requests waited."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from benchmarks.plots.picture import headed
from benchmarks.style import SOFT, WIDTH, title
from common.watch.trace import StepTrace


@dataclass(frozen=True)
class Traced:
    """What one stage did, as `benchmarks.trace` records it. `capacity`: token slots of its KV memory."""

    stage: str
    trace: StepTrace
    capacity: int


KINDS = {
    **{"waiting": "#E4E4E4", "prefill": "#0F6FC6", "fork": "#0B3C6D", "decode": "#8CC5F0", "recompute": "#D1495B"},
    **{"preempted": "#F3B8C0", "swapped": "#C9B3E6", "idle": "#FFFFFF"},
}
"""Names and colours; `idle` is hatched."""
_CODES = {kind: code for code, kind in enumerate(KINDS)}
_NOTHING = len(KINDS)


def states(run: Traced) -> np.ndarray:
    """[requests, steps]: the code of each request's state in each step."""
    steps = list(run.trace.steps)
    rows = {id: row for row, id in enumerate(run.trace.arrivals)}
    grid = np.full((len(rows), len(steps)), _CODES["waiting"])
    off: dict[str, int] = {}  # request id: the state it is in while no chunk of it runs, once it has started
    last: dict[str, int] = {}
    for column, step in enumerate(steps):
        off |= dict.fromkeys(step.preempted, _CODES["preempted"])
        off |= dict.fromkeys(step.swapped_out, _CODES["swapped"])
        for id, code in off.items():
            grid[rows[id], column:] = code
        for chunk in step.chunks:
            grid[rows[chunk.request_id], column] = _CODES[chunk.kind]
            off[chunk.request_id] = _CODES["waiting"]
            last[chunk.request_id] = column
    for id, column in last.items():
        grid[rows[id], column + 1 :] = _NOTHING
    return grid


def timeline_figure(runs: Sequence[Traced]) -> plt.Figure:
    """One panel for each run, on one scale of steps."""
    grids = [states(run) for run in runs]
    longest = max(grid.shape[1] for grid in grids)
    height = 1.0 + sum(0.9 + 0.19 * len(grid) for grid in grids)
    figure, axes = plt.subplots(
        len(runs), 1, figsize=(WIDTH, height), squeeze=False, sharex=True, height_ratios=[len(g) for g in grids]
    )
    for axis, run, grid in zip(axes[:, 0], runs, grids, strict=True):
        _panel(axis, run, grid, longest)
    axes[-1, 0].set_xlabel("step")
    used = [kind for kind, code in _CODES.items() if any((grid == code).any() for grid in grids)]
    names = {"idle": "finished, computed all the same", "recompute": "recomputed"}
    patches = [
        Patch(facecolor=KINDS[k], edgecolor=SOFT, hatch="////" if k == "idle" else None, label=names.get(k, k))
        for k in used
    ]
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.0, 0.0), "ncols": 4}
    figure.legend(handles=patches, frameon=False, **place)
    return headed(figure, _finding(runs, grids))


def _panel(axis: plt.Axes, run: Traced, grid: np.ndarray, longest: int) -> None:
    colors = ListedColormap([*KINDS.values(), "#FFFFFF"])
    axis.pcolormesh(grid, cmap=colors, vmin=-0.5, vmax=_NOTHING + 0.5, edgecolors="none")
    for row, codes in enumerate(grid):
        columns = np.flatnonzero(codes == _CODES["idle"])
        if columns.size:
            width = columns[-1] - columns[0] + 1
            axis.barh(row + 0.5, width, left=columns[0], height=1, color="white", edgecolor="#B0B0B0", hatch="////")
    for row in range(1, len(grid)):
        axis.axhline(row, color="white", linewidth=1.5)
    axis.invert_yaxis()
    axis.set(xlim=(0, longest), ylabel="request")
    axis.set_yticks([0.5, len(grid) - 0.5], ["first", "last"])
    axis.tick_params(axis="y", length=0)
    axis.set_title(f"{title(run.stage)}: {grid.shape[1]} steps", loc="left")


def _finding(runs: Sequence[Traced], grids: Sequence[np.ndarray]) -> str:
    if len(runs) == 1:
        return f"{len(grids[0])} requests on {title(runs[0].stage)}: {grids[0].shape[1]} steps"
    parts = " and ".join(f"{grid.shape[1]} steps on {title(run.stage)}" for run, grid in zip(runs, grids, strict=True))
    return f"The same {len(grids[0])} requests in the same memory: {parts}"
