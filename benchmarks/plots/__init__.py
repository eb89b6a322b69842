"""Pictures of a comparison. Each says what was found in its title, and is understood without the text around it."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

if "inline" not in (matplotlib.get_backend(auto_select=False) or ""):
    matplotlib.use("Agg")  # pictures go to files, and need no screen; a notebook shows them itself

from matplotlib import pyplot as plt

from benchmarks.compare import Results
from benchmarks.plots.block_size import block_size
from benchmarks.plots.by_length import by_length
from benchmarks.plots.chunk_size import chunk_size
from benchmarks.plots.hit_rate import by_turn, hit_rate
from benchmarks.plots.latency import latency
from benchmarks.plots.memory import memory
from benchmarks.plots.picture import save_picture
from benchmarks.plots.position import time_by_position
from benchmarks.plots.stalls import stalls
from benchmarks.plots.throughput import throughput
from benchmarks.style import RC

PICTURES: dict[str, Callable[[Results, str], plt.Figure | None]] = {
    **{"throughput": throughput, "latency": latency, "memory": memory, "time-per-token": time_by_position},
    **{"block-size": block_size, "stalls": stalls, "chunk-size": chunk_size, "hit-rate": hit_rate},
    **{"by-turn": by_turn, "": by_length},
}
"""By the end of the file's name; the one without is named after the workload alone."""


def draw(results: Results, workload: str, name: str, path: Path) -> Path | None:
    """Draw one of `PICTURES` into that file; None where the results have no data for it."""
    with plt.rc_context(RC):
        figure = PICTURES[name](results, workload)
    return None if figure is None else save_picture(path, lambda: figure)


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw what the results have data for, as `<workload>-<picture>.png`; returns the files."""
    wanted = [(workload, name) for workload in results.config["workloads"] for name in PICTURES]
    drawn = [draw(results, workload, name, folder / file_name(workload, name)) for workload, name in wanted]
    return [path for path in drawn if path is not None]


def file_name(workload: str, name: str) -> str:
    return f"{workload}{name and '-'}{name}.png"
