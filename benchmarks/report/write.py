"""`make report`: the page, its Markdown twin, the pages for interviews in two languages, and the READMEs' table."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.files import check_writable, write_atomically
from benchmarks.report.blocks import to_markdown
from benchmarks.report.content import report
from benchmarks.report.fill import Filler
from benchmarks.report.html import to_html
from benchmarks.report.pictures import draw
from benchmarks.report.readme import OWN, TEMPLATES, readmes
from benchmarks.report.sources import REPORTS, Machine, kept, read_machines
from common.errors import require
from common.watch.progress import progress_bar

PAGES = {"interview_guide": ("interview_guide", "interview_beyond"), "interview_tomorrow": ("interview_tomorrow",)}
"""Of each page for interviews, the templates that it is made of, one after the other."""
LANGUAGES = {".md": "en", ".zh-CN.md": "zh"}


def write_all(reports: Path = REPORTS) -> Iterator[Path]:
    """From the kept results into `reports`; if there are own ones too, from all of them into `reports/local`."""
    machines = read_machines(reports)
    require(bool(machines), f"no results under {reports}: run `make bench` first")
    repository = kept(machines)
    with progress_bar("drawing", len(machines)) as advance:
        pictures = {}
        for name, machine in machines.items():
            pictures[name] = draw(machine)
            advance(1)
    for folder, found in ((reports, repository), (reports / "local", machines)):
        if not found or (folder != reports and len(repository) == len(machines)):
            continue
        check_writable(folder / "report.html")
        fillers = {name: Filler(found, name, folder) for name in found}
        text = to_markdown(report(list(found.values()), fillers, pictures), folder)
        yield _write(folder / "report.html", to_html("FoloVLLM: what was measured", text, folder))
        yield _write(folder / "report.md", text)
        for name, guide in guides(found, folder).items():
            yield _write(folder / name, guide)
    if reports == REPORTS and OWN in repository:
        for name, text in readmes(repository).items():
            yield _write(ROOT / name, text)


def guides(machines: Mapping[str, Machine], folder: Path) -> dict[str, str]:
    """The pages for interviews in each language, by file name. Figures are the reader's own where there are any."""
    own, fallback = ("local", OWN) if "local" in machines else (OWN, None)
    filled: dict[str, str] = {}
    for page, names in PAGES.items():
        for ending, language in LANGUAGES.items():
            parts = [path.read_text(encoding="utf-8") for n in names if (path := TEMPLATES / f"{n}{ending}").is_file()]
            if parts:
                filled[page + ending] = Filler(machines, own, folder, language, fallback).fill("\n".join(parts))
    return filled


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    return path
