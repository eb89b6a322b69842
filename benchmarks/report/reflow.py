"""Filled texts, wrapped anew: what stood in a placeholder's place is longer or shorter than it."""

from __future__ import annotations

import re
import textwrap

WIDTH = 120
ITEM = re.compile(r"^(\s*)([-*]|\d+\.) ")
WHOLE = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)")
UNIT = re.compile(r"(\d) (?=(?:%|s\b|ms\b|[kMG]B\b))")
"""Code and links, and a number before its unit: never broken."""
GLUE = "\x00"


def reflow(text: str) -> str:
    """Markdown with its paragraphs and list items wrapped at `WIDTH`; headings and tables as they are."""
    out: list[str] = []
    pending: list[str] = []
    for line in [*text.split("\n"), ""]:
        plain = line.strip()
        stands_alone = not plain or plain.startswith(("#", "|", "```"))
        if pending and (stands_alone or ITEM.match(line)):
            out += _wrap(pending)
            pending = []
        if stands_alone:
            out.append(line)
        else:
            pending.append(line)
    return "\n".join(out[:-1])


def _wrap(lines: list[str]) -> list[str]:
    item = ITEM.match(lines[0])
    start = item[0] if item else ""
    indent = " " * len(start)
    words = " ".join([lines[0][len(start) :].strip(), *(line.strip() for line in lines[1:])])
    words = WHOLE.sub(lambda whole: whole[0].replace(" ", GLUE), words)
    words = UNIT.sub(rf"\1{GLUE}", words)
    wrapped = textwrap.wrap(
        words, WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(GLUE, " ") for line in wrapped]
