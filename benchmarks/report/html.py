"""The report's Markdown as one HTML page, for light and dark screens, that needs no other file: pictures are in it."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from benchmarks.report.verdicts import MET, NOT_MEASURED, NOT_MET

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f22; --soft: #5f6670; --paper: #fdfdfb; --line: #d9dbd6; --band: #f2f3ef;
  --met: #0b6b2b; --missed: #a8271b; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa3ad; --paper: #16181b; --line: #363b41;
  --band: #1f2327; --met: #69c884; --missed: #f08a7c; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { margin: 2rem 0 .5rem; }
p { max-width: 46rem; }
a { color: var(--link); }
nav { margin: 1.5rem 0; display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--band);
  padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .75rem 0 1.5rem; }
table { border-collapse: collapse; text-align: left; font-size: .88rem; font-variant-numeric: tabular-nums; }
p:has(+ .wide) { font-size: .88rem; color: var(--soft); } p:has(img) { max-width: none; }
th { vertical-align: bottom; border-bottom: 2px solid var(--line); padding: .3rem .7rem; }
td { vertical-align: top; border-bottom: 1px solid var(--line); padding: .35rem .7rem; min-width: 4.5rem; }
td:first-child, th:first-child { padding-left: .3rem; }
[style] { white-space: nowrap; }
tbody tr:hover { background: var(--band); }
.met { color: var(--met); font-weight: 600; } .missed { color: var(--missed); font-weight: 600; }
.absent { color: var(--soft); }
img { max-width: min(100%, 56rem); display: block; height: auto;
  background: #fff; border-radius: 8px; padding: .5rem; margin: .5rem 0 1.25rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
"""
WIDTH, COLORS = 1200, 96
CLASSES = {MET: "met", NOT_MET: "missed", NOT_MEASURED: "absent"}


def to_html(title: str, text: str, folder: Path) -> str:
    """text: Markdown that names pictures as seen from `folder`."""
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
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _data_uri(path: Path) -> str:
    """A picture as wide as the page, in as many colours as it needs: a tenth of the bytes."""
    with Image.open(path) as picture:
        width = min(picture.width, WIDTH)
        flat = picture.convert("RGB").resize(
            (width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS
        )
    out = io.BytesIO()
    flat.quantize(COLORS).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
