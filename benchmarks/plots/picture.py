"""How a picture is drawn, headed and written."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.files import write_atomically
from benchmarks.style import RC, SOFT


def save_picture(path: Path, draw: Callable[[], plt.Figure]) -> Path:
    """Draw in the style of the repository and write the file."""
    with plt.rc_context(RC):
        figure = draw()
        write_atomically(path, figure.savefig)
        plt.close(figure)
    return path


def headed(figure: plt.Figure, finding: str, *notes: str, size: int = 17, width: int = 76) -> plt.Figure:
    """The finding on top, in lines of `width` characters; below, how to read the picture, each note from a new line."""
    figure.tight_layout()
    look: Any = {"x": 0.01, "y": 1.0, "ha": "left", "va": "bottom", "fontsize": size, "fontweight": "bold"}
    figure.suptitle(textwrap.fill(finding, width), **look)
    lines = [line for note in notes for line in textwrap.wrap(note, 108)]
    figure.text(0.01, -0.01, "\n".join(lines), fontsize=11.5, color=SOFT, va="top")
    return figure
