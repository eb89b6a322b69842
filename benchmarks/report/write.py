"""`make report`: the page, its Markdown twin, the pages for interviews in two languages, and the READMEs' table."""

import base64
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from benchmarks.environment import ROOT
from benchmarks.files import check_writable, write_atomically
from benchmarks.report.blocks import TEMPLATES, to_markdown
from benchmarks.report.claims import MET, NOT_MEASURED, NOT_MET
from benchmarks.report.content import report
from benchmarks.report.fill import Filler
from benchmarks.report.pictures import draw
from benchmarks.report.readme import OWN, readmes
from benchmarks.report.sources import REPORTS, Machine, kept, read_machines
from common.errors import require
from common.watch.progress import progress_bar

PAGES = {"interview_guide": ("interview_guide", "interview_beyond"), "interview_tomorrow": ("interview_tomorrow",)}
"""Of each page for interviews, the templates that it is made of, one after the other."""
LANGUAGES = {".md": "en", ".zh-CN.md": "zh"}
WIDTH, COLORS = 1200, 96  # of a picture in the page: pixels, and how many colours
CLASSES = {MET: "met", NOT_MET: "missed", NOT_MEASURED: "absent"}


def write_all(reports: Path = REPORTS) -> Iterator[Path]:
    """From the kept results into `reports`; if there are own ones too, from all of them into `reports/local`."""
    machines = read_machines(reports)
    require(bool(machines), f"no results under {reports}: run `make bench` first")
    repository = kept(machines)
    with progress_bar("drawing", len(machines)) as advance:
        pictures = {}
        for name, machine in machines.items():
            pictures[name] = list(draw(machine))
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


def to_html(title: str, text: str, folder: Path) -> str:
    """The report as one page, for light and dark screens, that needs no other file: pictures are in it. text: Markdown
    that names pictures as seen from `folder`."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    body = MarkdownIt("commonmark").enable("table").render(text)
    headings: list[str] = re.findall("<h2>(.*?)</h2>", body)
    body = re.sub("<h2>(.*?)</h2>", lambda match: f'<h2 id="{_anchor(match[1])}">{match[1]}</h2>', body)
    links = "".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading in headings)
    body = body.replace("</h1>", f"</h1>\n<nav>{links}</nav>")
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for verdict, name in CLASSES.items():
        body = body.replace(f"<td>{verdict}</td>", f'<td class="{name}">{verdict}</td>')
    body = re.sub('<img src="([^"]*)"', lambda match: f'<img src="{_data_uri(folder / match[1])}"', body)
    return (TEMPLATES / "report.html").read_text(encoding="utf-8").format(title=title, style=style, body=body)


def _data_uri(path: Path) -> str:
    """A picture as wide as the page, in as many colours as it needs: a tenth of the bytes."""
    with Image.open(path) as picture:
        flat = picture.convert("RGB")
    flat.thumbnail((WIDTH, flat.height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.quantize(COLORS).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
