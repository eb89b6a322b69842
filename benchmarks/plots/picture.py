"""How a picture is drawn, headed and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.files import write_atomically
from benchmarks.style import RC, SOFT


def save_picture(path: Path, draw: Callable[[], Figure]) -> Path:
    """Draw in the style of the repository and write the file."""
    with plt.rc_context(RC):
        figure = draw()
        write_atomically(path, figure.savefig)
        plt.close(figure)
    return path


def headed(figure: Figure, finding: str, note: str = "") -> Figure:
    """The finding on top, how to read the picture below."""
    figure.suptitle(finding, x=0.01, ha="left", fontsize=17, fontweight="bold")
    figure.text(0.01, 0.01, note, fontsize=12, color=SOFT)
    figure.tight_layout(rect=(0, 0.05, 1, 0.99))
    return figure
