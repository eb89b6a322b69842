"""Blocks as one HTML page that needs nothing beside itself: pictures are data URIs; it is light or dark as asked."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.report.blocks import Block, Folded, Heading, Paragraph, Picture, Table
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
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid var(--line); padding: .3rem .7rem; }
td { vertical-align: top; border-bottom: 1px solid var(--line); padding: .35rem .7rem; min-width: 4.5rem; }
td:first-child, th:first-child { padding-left: .3rem; }
.number { text-align: right; white-space: nowrap; }
tbody tr:hover { background: var(--band); }
.met { color: var(--met); font-weight: 600; } .missed { color: var(--missed); font-weight: 600; }
.absent { color: var(--soft); }
img { max-width: min(100%, 56rem); display: block; height: auto;
  background: #fff; border-radius: 8px; padding: .5rem; margin: .5rem 0 1.25rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
"""
WIDTH, COLORS = 1200, 96
INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\*([^*]+)\*")
CLASSES = {MET: "met", NOT_MET: "missed", NOT_MEASURED: "absent"}


def to_html(title: str, blocks: Sequence[Block]) -> str:
    headings = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{_inline(text)}</a>' for text in headings)
    parts = [_block(block) for block in blocks]
    first = 1 + next((i for i, b in enumerate(blocks) if isinstance(b, Heading) and b.level == 1), -1)
    body = "\n".join([*parts[:first], f"<nav>{links}</nav>", *parts[first:]])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            name = f' id="{_anchor(text)}"' if level == 2 else ""  # the others may come twice
            return f"<h{level}{name}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Table():
            return _table(block)
        case Picture(path, alt):
            data = base64.b64encode(_small(path)).decode()
            return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
        case Folded(title, inner):
            parts = "\n".join(map(_block, inner))
            return f"<details><summary>{_inline(title)}</summary>\n{parts}\n</details>"


def _small(path: Path) -> bytes:
    """A picture as wide as the page, in as many colours as it needs: a tenth of the bytes."""
    with Image.open(path) as picture:
        width = min(picture.width, WIDTH)
        flat = picture.convert("RGB").resize(
            (width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS
        )
    out = io.BytesIO()
    flat.quantize(COLORS).save(out, "PNG", optimize=True)
    return out.getvalue()


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        out: list[str] = []
        for number, cell in enumerate(row):
            names = ["number"] if number >= table.words else []
            names += [CLASSES[cell]] if cell in CLASSES else []
            kind = f' class="{" ".join(names)}"' if names else ""
            out.append(f"<{tag}{kind}>{_inline(cell)}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"

    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(cells(row, "td") for row in table.rows)
    return (
        f'<div class="wide"><table>{caption}<thead>{cells(table.headers, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _inline(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        code, strong, soft = match.groups()
        return f"<code>{code}</code>" if code else f"<strong>{strong}</strong>" if strong else f"<em>{soft}</em>"

    return INLINE.sub(replace, html.escape(text, quote=False))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
