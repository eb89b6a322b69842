"""KV memory as a map: a cell is one block of token slots, coloured by the request that holds it."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from benchmarks.plots.picture import headed
from benchmarks.plots.timeline import Traced
from benchmarks.style import INK, WIDTH, title

CELL = 16  # token slots in a cell: the paged stages' block size; a long slot is as many cells as it has room for
COLUMNS = 16


def memory_map_figure(runs: Sequence[Traced]) -> plt.Figure:
    """Each run at the step in which most requests run, and of those the one that stores most; one below the other."""
    runs = [run for run in runs if run.capacity]
    rows = max(-(-run.capacity // CELL // COLUMNS) for run in runs)
    figure, axes = plt.subplots(len(runs), 1, figsize=(WIDTH, len(runs) * (0.7 + 0.42 * rows)), squeeze=False)
    summaries = [_panel(axis, run) for axis, run in zip(axes[:, 0], runs, strict=True)]
    note = f"A cell is {CELL} token slots; its colour and number: the request (+: and others). Solid: tokens stored. "
    note += "Pale: reserved, empty. White: free."
    return headed(figure, " → ".join(summaries), note)


def _panel(axis: plt.Axes, run: Traced) -> str:
    step = max(run.trace.steps, key=lambda s: (s.running, s.kv_stored))
    palette = plt.get_cmap("tab20")
    owners = {id: number for number, id in enumerate(run.trace.arrivals)}
    cells = -(-run.capacity // CELL)
    for cell in range(cells):
        x, y = cell % COLUMNS, cell // COLUMNS
        axis.add_patch(Rectangle((x, y), 0.94, 0.9, facecolor="white", edgecolor="#C8C8C8", linewidth=0.7))
    for region in step.regions or ():
        number = owners[region.owners[0]]
        for offset in range(0, region.length, CELL):
            x, y = (region.start + offset) // CELL % COLUMNS, (region.start + offset) // CELL // COLUMNS
            filled = min(CELL, max(0, region.stored - offset)) / CELL
            color = palette(number % 20)
            axis.add_patch(Rectangle((x, y), 0.94, 0.9, facecolor=color, alpha=0.22, linewidth=0))
            axis.add_patch(Rectangle((x, y), 0.94 * filled, 0.9, facecolor=color, linewidth=0))
            mark = f"{number}" + ("+" if len(region.owners) > 1 else "")
            if filled:
                axis.text(x + 0.47, y + 0.47, mark, ha="center", va="center", fontsize=11, color=INK)
    axis.set(xlim=(0, COLUMNS), ylim=(-(-cells // COLUMNS), 0))
    axis.set_axis_off()
    held = {id for region in step.regions or () for id in region.owners}
    use = step.kv_stored / step.kv_reserved if step.kv_reserved else 0.0
    held_slots = f"{len(held)} requests hold {step.kv_reserved} of {run.capacity} slots"
    axis.set_title(f"{title(run.stage)}: {held_slots}, {use:.0%} of them filled", loc="left")
    return f"{run.stage}: {len(held)} requests hold memory, {use:.0%} of it filled"
