"""The part of each README that holds figures, written anew between its two marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine
from common.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
READMES = {"README.md": ("stages.md", "en"), "README.zh-CN.md": ("stages.zh-CN.md", "zh")}
PART = re.compile(r"(<!-- figures: [^\n]*-->\n).*?(<!-- end of figures -->)", flags=re.S)
OWN = "cpu"


def readmes(machines: Mapping[str, Machine]) -> dict[str, str]:
    """Both, by file name, with the figures of the kept results; `UserError` where a README lost its marks."""
    filled: dict[str, str] = {}
    for name, (template, language) in READMES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        if len(PART.findall(text)) != 1:
            raise UserError(f"{name} has no table of figures: put it back between its two marks (benchmarks/report)")
        filler = Filler(machines, OWN, ROOT, language, missing="–")
        figures = filler.fill((TEMPLATES / template).read_text(encoding="utf-8"))
        filled[name] = PART.sub(lambda match, figures=figures: match[1] + figures + match[2], text)
    return filled
