"""Every link, line reference and command of the texts is true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import stages
from benchmarks.__main__ import app as benchmarks_app
from benchmarks.report.sources import REPORTS, read_machines
from benchmarks.report.write import guides

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
SYMBOL = re.compile(r"`([\w.]+)`")


def texts() -> list[Path]:
    """All Markdown that a reader sees; not the templates, whose links are placeholders, nor what a reader made."""
    hidden = {"templates", "local", "node_modules", "build", "dist"}
    found = [p for p in ROOT.rglob("*.md") if not any(part[0] == "." or part in hidden for part in p.parts[1:])]
    return sorted(p.relative_to(ROOT) for p in found)


TEXTS = texts()
IDS = [str(path) for path in TEXTS]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def defines(line: str, name: str) -> bool:
    return re.match(rf"\s*((async )?def |class ){name}\b|\s*{name}\b[^=]*=", line) is not None


def wrong_links(path: Path, text: str) -> list[str]:
    wrong: list[str] = []
    for label, target in LINK.findall(without_code(text)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif line := re.fullmatch(r"L(\d+)", anchor):
            lines = file.read_text(encoding="utf-8").splitlines()
            number, symbol = int(line[1]), SYMBOL.fullmatch(label)
            if number > len(lines):
                wrong.append(f"{target}: the file has {len(lines)} lines")
            elif symbol and not defines(lines[number - 1], symbol[1].split(".")[-1]):
                wrong.append(f"{target}: that line does not define {symbol[1]}")
        elif anchor and anchor not in headings(file):
            wrong.append(f"{target}: no such heading")
    return wrong


def commands(text: str, program: str) -> list[list[str]]:
    """The words behind `program` in code: spans, and lines of blocks, up to a comment, a pipe or a quote."""
    code = SPAN.findall(without_code(text))
    code += [
        line for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()
    ]
    found = [re.search(rf"(?:^|[|;$] ?){re.escape(program)}(?=\s|$)([^#|;\"'`]*)", line.strip()) for line in code]
    return [match[1].split() for match in found if match]


def known_words() -> set[str]:
    source = (ROOT / "Makefile").read_text()
    verbs = [word for words in re.findall(r"^\w+_VERBS +:= (.+)$", source, flags=re.M) for word in words.split()]
    assert "bench" in verbs
    return {*verbs, *(f"stage{stages.number(folder)}" for folder in stages.names())}


def known_options() -> set[str]:
    return set(re.findall(r"^([A-Z]+) +\?=", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_a_link_leads_nowhere(path: Path) -> None:
    assert wrong_links(ROOT / path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_a_make_command_has_unknown_words(path: Path) -> None:
    words, options = known_words(), known_options()
    for command in commands((ROOT / path).read_text(encoding="utf-8"), "make"):
        for word in command:
            name, equals, _ = word.partition("=")
            assert name in (options if equals else words), f"make {' '.join(command)}"


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_a_module_that_is_run_does_not_exist(path: Path) -> None:
    of_benchmarks = {c.name or c.callback.__name__ for c in benchmarks_app.registered_commands if c.callback}
    for command in commands((ROOT / path).read_text(encoding="utf-8"), "python -m"):
        module = command[0]
        to_come = re.match(r"stages\.(m\d_\w+)", module)
        if to_come and not (ROOT / "stages" / to_come[1]).is_dir() and path.parts[0] == "reports":
            continue  # what will measure a figure that the guide does not have yet
        if module.split(".")[0] in ("benchmarks", "stages", "common"):
            assert importlib.util.find_spec(module) is not None, command
        if module == "benchmarks" and len(command) > 1 and not command[1].startswith("-"):
            assert command[1] in of_benchmarks, command


@pytest.mark.parametrize("name", ["interview_guide.md", "interview_guide.zh-CN.md"])
def test_the_guide_is_not_what_make_report_writes(name: str) -> None:
    kept = {folder: machine for folder, machine in read_machines().items() if folder != "local"}
    assert (REPORTS / name).read_text(encoding="utf-8") == guides(kept, REPORTS)[name], "run `make report`"


def test_the_checks_see_nothing() -> None:
    here = ROOT / "README.md"
    assert len(wrong_links(here, "[a](none.md) [b](README.md#none) [`main`](Makefile#L99999)")) == 3
    assert wrong_links(here, "[`Engine.step`](common/engine.py#L1)") != []
    assert commands("Run `make nonsense`.\n```\necho hi | make stage1 chat  # talk\n```\n", "make") == [
        ["nonsense"],
        ["stage1", "chat"],
    ]
    assert "nonsense" not in known_words()
    assert len(TEXTS) > 10
