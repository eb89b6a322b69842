"""What `make report` writes in READMEs: the table of stages between its two marks, and each marked figure in a text.

<!--=mixed.m3.output_tokens_per_s|rate-->315<!--/-->    a figure of `benchmarks.report.figures`, here of the kept CPU
<!--=h100:mixed.m3.ttft_s.p50/mixed.m4.ttft_s.p50|x-->  of a named machine; a ratio, written without spaces
<!--=quality.int4~GPTQ.perplexity|ppl-->                a `~` is a space of a name: a mark stays one word

A line of Markdown must not begin with a mark: an HTML comment there ends the paragraph. In a table the `|` is `\\|`.
"""

import re
from collections.abc import Mapping

from benchmarks.environment import ROOT
from benchmarks.report.blocks import TEMPLATES
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine
from common.errors import UserError

READMES = {"README.md": ("stages.md", "en"), "README.zh-CN.md": ("stages.zh-CN.md", "zh")}
PART = re.compile(r"(<!-- figures: [^\n]*-->\n).*?(<!-- end of figures -->)", flags=re.S)
MARKED = re.compile(r"(<!--=([^>|\\]+)\\?\|(\w+)-->).*?(<!--/-->)", flags=re.S)
PAGES = ("reports/execution.md", "benchmarks/bottlenecks.md")  # others with marked figures
OWN = "cpu"


def readmes(machines: Mapping[str, Machine]) -> dict[str, str]:
    """All that hold figures, by path, with those of the kept results; `UserError` where a README lost its marks, or
    marks a figure that was not measured."""
    filled: dict[str, str] = {}
    for name, (template, language) in READMES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        if len(PART.findall(text)) != 1:
            raise UserError(f"{name} has no table of figures: put it back between its two marks (benchmarks/report)")
        filler = Filler(machines, OWN, ROOT, language, missing="–")
        figures = filler.fill((TEMPLATES / template).read_text(encoding="utf-8"))
        filled[name] = PART.sub(lambda match, figures=figures: match[1] + figures + match[2], text)
    for path in sorted([*ROOT.glob("stages/m*/README.md"), *(ROOT / name for name in PAGES if (ROOT / name).exists())]):
        filled[path.relative_to(ROOT).as_posix()] = fill_marked(path.read_text(encoding="utf-8"), machines)
    return filled


def fill_marked(text: str, machines: Mapping[str, Machine]) -> str:
    """A text with its marked figures as they were measured; `UserError` for one that was not."""
    filler = Filler(machines, OWN, ROOT, missing="")

    def one(match: re.Match[str]) -> str:
        name = match[2].replace("~", " ").replace("/", " / ")
        spaced = re.sub(r"-1$", " - 1", re.sub(r"(^|:)1-", r"\g<1>1 - ", name))
        value = filler.fill(f"{{figure:{spaced}|{match[3]}}}")
        if not value:
            raise UserError(f"{match[2]} was not measured: measure it, or delete the figure and its mark")
        return match[1] + value + match[4]

    return MARKED.sub(one, text)
