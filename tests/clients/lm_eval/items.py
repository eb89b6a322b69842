"""Questions from this repository's own texts: `python -m tests.clients.lm_eval.items` writes them.

The files are kept, so that results stay comparable while the texts change: whoever writes them again starts a new
series. Sentences with digits are left out, since figures of a text go out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent
CHOICES, QUOTES = FOLDER / "folovllm_continuation.jsonl", FOLDER / "folovllm_quotation.jsonl"
NUM_CHOICES, NUM_QUOTES = 200, 300
TEXTS = ("README.md", "CONTRIBUTING.md", "benchmarks", "common", "notebooks", "stages", "reports/interview_guide.md")
CONTEXT, ANSWER, OPENING = 36, 12, 4
"""Words: most of a context and of an answer; those of a quoted sentence that are given."""


def paragraphs(file: Path) -> Iterator[list[str]]:
    """The usable sentences of each paragraph of a Markdown file, or of each docstring of a module; no code, tables or
    headings."""
    text = file.read_text()
    if file.suffix == ".py":
        text = "\n\n".join(re.findall(r'"""([A-Z].*?)"""', text, flags=re.DOTALL))
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
        if block.lstrip()[:1] in ("|", "#", ">", "<"):
            continue
        line = " ".join(re.sub(r"^\s*(?:[-*]|\d+\.) |[`*]", "", block).split())
        found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", line)
        yield [s for s in found if s.endswith(".") and not re.search(r"(?<![a-z])\d|[\"|]|\.\w|\. ", s)]


def sources() -> list[list[list[str]]]:
    """For each text its paragraphs of at least two usable sentences."""
    found = [f for name in TEXTS for f in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    files = sorted(f for f in found if f.suffix in (".md", ".py") and "zh-CN" not in f.name)
    texts = [[p for p in paragraphs(f) if len(p) > 1] for f in files if "templates" not in f.parts]
    return [text for text in texts if text]


def second_half(sentence: str) -> str:
    words = sentence.split()
    return " ".join(words[len(words) // 2 :][:ANSWER])


def continuations(random: Random) -> Iterator[dict[str, Any]]:
    """How does a sentence go on behind its first half? The other ends are of sentences from anywhere."""
    sentences = [s for text in sources() for p in text for s in p]
    ends = [second_half(s) for s in sentences if len(s.split()) > 7]
    for paragraph in (p for text in sources() for p in text):
        for before, sentence in pairwise(paragraph):
            words, end = sentence.split(), second_half(sentence)
            choices = [end, *random.sample(ends, 3)]
            order = random.sample(range(4), 4)
            passage = " ".join([*before.split()[-CONTEXT:], *words[: len(words) // 2]])
            if len(words) > 7 and len(set(choices)) == 4:
                yield {"passage": passage, "choices": [choices[i] for i in order], "answer": order.index(0)}


def quotations(random: Random) -> Iterator[dict[str, Any]]:
    """How does a sentence of a passage go on, up to its full stop?"""
    for paragraph in (p for text in sources() for p in text):
        for start in range(0, len(paragraph) - 1, 3):
            passage = paragraph[start : start + 3]
            words = random.choice(passage).rstrip(".").split()
            if len(passage) > 1 and OPENING + 3 <= len(words) <= OPENING + 16 and len(" ".join(passage).split()) < 80:
                opening, rest = " ".join(words[:OPENING]), " ".join(words[OPENING:])
                yield {"passage": " ".join(passage), "opening": opening, "rest": rest}


def main() -> None:
    random = Random(0)
    for path, made, most in ((CHOICES, continuations, NUM_CHOICES), (QUOTES, quotations, NUM_QUOTES)):
        items = list(made(random))
        chosen = random.sample(items, most)
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in chosen))
        print(f"{path.relative_to(ROOT)}: {most} of {len(items)} items")


if __name__ == "__main__":
    main()
