"""How a picture is drawn, headed and written."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    figure.tight_layout()
    look: Any = {"x": 0.01, "y": 1.0, "ha": "left", "va": "bottom", "fontsize": 17, "fontweight": "bold"}
    figure.suptitle(textwrap.fill(finding, 76), **look)
    figure.text(0.01, -0.01, textwrap.fill(note, 108), fontsize=11.5, color=SOFT, va="top")
    return figure
