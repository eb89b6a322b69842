"""The report's Markdown as one HTML page, for light and dark screens, that needs no other file: pictures are in it."""

import base64
import io
import re
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from benchmarks.report.claims import MET, NOT_MEASURED, NOT_MET
from benchmarks.report.readme import TEMPLATES

WIDTH, COLORS = 1200, 96
CLASSES = {MET: "met", NOT_MET: "missed", NOT_MEASURED: "absent"}


def to_html(title: str, text: str, folder: Path) -> str:
    """text: Markdown that names pictures as seen from `folder`."""
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
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


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
