"""Colours and text sizes of every picture in the repository: a stage has one colour, wherever it is drawn.

The eight colours are Paul Tol's `muted` scheme (https://sronpersonalpages.nl/~pault/), which readers with any kind of
colour blindness can tell apart; peers are greys. Names next to the data repeat it, for prints in grey.
"""

from typing import Any

STAGES = {
    "m0": ("#882255", "m0 baseline"),
    "m1": ("#CC6677", "m1 KV cache"),
    "m2": ("#DDAA33", "m2 continuous batching"),
    "m3": ("#999933", "m3 paged KV"),
    "m4": ("#117733", "m4 flash attention"),
    "m5": ("#44AA99", "m5 chunked prefill"),
    "m6": ("#66AADD", "m6 prefix caching"),
    "m7": ("#332288", "m7 GPTQ"),
}
STAGE_COLORS = {stage: color for stage, (color, _) in STAGES.items()}
STAGE_TITLES = {stage: title for stage, (_, title) in STAGES.items()}
PEER_COLORS = {"transformers-static": "#B8B8B8", "transformers-continuous": "#8C8C8C"}
PEER_COLORS |= {"llama.cpp Q4_0": "#505050", "llama.cpp BF16": "#787878", "llama.cpp Q4_1": "#A0A0A0"}
INK, SOFT = "#222222", "#707070"
WIDTH = 11.0  # Inches. A page shows a picture about 830 pixels wide: at this width 11 points are 11 of them.


def color(stage: str) -> str:
    return STAGE_COLORS.get(stage) or PEER_COLORS.get(stage, "#A0A0A0")


def title(stage: str) -> str:
    """`m1 KV cache` for m1; a peer's own name."""
    return STAGE_TITLES.get(stage, stage)


RC: Any = {
    **{"font.size": 14, "axes.titlesize": 14, "axes.labelsize": 13},
    **dict.fromkeys(("text.color", "axes.labelcolor", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color"), SOFT),
    **{"axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white", "figure.dpi": 120},
    **{"savefig.dpi": 150, "savefig.bbox": "tight", "savefig.pad_inches": 0.2},
}
"""For `matplotlib.rc_context`."""
