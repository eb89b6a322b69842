"""Every link, line reference and command of the texts is true."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import stages
from benchmarks.__main__ import app as benchmarks_app
from benchmarks.compare import Results
from benchmarks.report.figures import show
from benchmarks.report.readme import fill_marked, readmes
from benchmarks.report.sources import REPORTS, kept, read_machines
from benchmarks.report.write import PAGES, guides
from common.cli import stage_app
from common.errors import UserError
from stages.__main__ import app as stages_app
from stages.m7_gptq.checkpoint.cli import add_commands

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
SYMBOL = re.compile(r"`([\w.]+)`")


def texts() -> list[Path]:
    """All Markdown that a reader sees, notebooks too; not the templates, whose links are placeholders, nor what a
    reader made."""
    hidden = {"templates", "local", "node_modules", "build", "dist"}
    found = [p.relative_to(ROOT) for pattern in ("*.md", "*.ipynb") for p in ROOT.rglob(pattern)]
    return sorted(p for p in found if not any(part[0] == "." or part in hidden for part in p.parts))


def read(path: Path) -> str:
    """A text; of a notebook, what its Markdown cells say."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join(source if isinstance(source, str) else "".join(source) for source in cells)


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


def unknown_options(command: list[str]) -> list[str]:
    """Of `python -m ...`: commands and options that the command line of this repository does not have."""
    app = command_line(command[0])
    if app is None:
        return []
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    words = [word.strip("()[],.") for word in command[1:]]
    chosen = next((word for word in words if word in group.commands), None)
    if words and not words[0].startswith("-") and words[0] not in group.commands:
        return words[:1]
    known = {"--help", "-h"}
    if chosen is not None:
        known |= {option for param in group.commands[chosen].params for option in [*param.opts, *param.secondary_opts]}
    return [word for word in words if word.startswith("-") and word.split("=")[0] not in known]


def command_line(module: str) -> typer.Typer | None:
    if module == "benchmarks":
        return benchmarks_app
    if module == "stages":
        return stages_app
    if not module.startswith("stages.m"):
        return None
    folder = module.split(".")[1]
    app = stage_app(ROOT / "stages" / folder, importlib.import_module(f"stages.{folder}.engine").build)
    if folder == "m7_gptq":
        add_commands(app)
    return app


def known_words() -> set[str]:
    source = (ROOT / "Makefile").read_text()
    verbs = [word for words in re.findall(r"^\w+_VERBS +:= (.+)$", source, flags=re.M) for word in words.split()]
    assert "bench" in verbs
    return {*verbs, *(f"stage{stages.number(folder)}" for folder in stages.names())}


def known_options() -> set[str]:
    return set(re.findall(r"^([A-Z_]+) +\?=", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_every_link_leads_to_something_that_exists(path: Path) -> None:
    """Must not lead nowhere."""
    assert wrong_links(ROOT / path, read(ROOT / path)) == []


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_every_make_command_consists_of_known_words(path: Path) -> None:
    words, options = known_words(), known_options()
    if path.parent == Path():
        words.add(f"stage{len(stages.names())}")  # the one that README tells how to add
    for command in commands(read(ROOT / path), "make"):
        for word in command:
            name, equals, _ = word.partition("=")
            assert name in (options if equals else words), f"make {' '.join(command)}"


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_every_module_that_is_run_exists_and_has_its_options(path: Path) -> None:
    for command in commands(read(ROOT / path), "python -m"):
        module = command[0]
        if module.split(".")[0] in ("benchmarks", "stages", "common", "notebooks"):
            assert importlib.util.find_spec(module) is not None, command
        assert unknown_options(command) == [], command


def test_figures_in_readmes_are_what_make_report_writes() -> None:
    for name, text in readmes(kept(read_machines())).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run `make report`"
        assert not re.search(r"^\s*<!--=", text, flags=re.M), f"{name}: a mark that begins a line ends the paragraph"
        assert not re.search(r"^\|.*<!--=[^>]*(?<!\\)\|", text, flags=re.M), f"{name}: a mark's `|` splits a cell"


def test_a_marked_figure_is_looked_up_and_a_missing_one_is_refused() -> None:
    machines = kept(read_machines())
    records = Results.read(REPORTS / "cpu" / "bench.json").records
    speeds = {r.stage: r.output_tokens_per_s or 0 for r in records if r.workload == "mixed"}
    m2, m3 = (f"mixed.{stage}.output_tokens_per_s" for stage in ("m2", "m3"))
    text = f"a <!--={m3}|n-->7<!--/--> b <!--={m3}/{m2}-1|signed-->?<!--/-->, <!--=1-{m2}/{m3}|share--><!--/-->."
    found = re.sub("<!--.*?-->", "", fill_marked(text, machines))
    gain, share = speeds["m3"] / speeds["m2"] - 1, 1 - speeds["m2"] / speeds["m3"]
    assert found == f"a {speeds['m3']:,.0f} b {show(gain, 'signed')}, {show(share, 'share')}."
    assert fill_marked("<!--=quality.int8~head.layer_bytes\\|size--><!--/-->", machines).endswith(" MB<!--/-->")
    with pytest.raises(UserError, match="was not measured"):
        fill_marked("<!--=mixed.m99.output_tokens_per_s|n-->7<!--/-->", machines)


@pytest.mark.parametrize("name", ["README", *(f"reports/{page}" for page in PAGES)])
def test_both_languages_link_to_the_same_targets(name: str) -> None:
    """What one language points at, the other does, itself apart; each in its own language where there are both."""
    texts = [ROOT / f"{name}{end}" for end in (".md", ".zh-CN.md")]
    found = [set(re.findall(r"\]\(([^()\s]+)\)", read(path))) for path in texts if path.exists()]
    assert len(found) != 1, f"{name} is there in one language only"
    plain = [{target.partition("#")[0].replace(".zh-CN.md", ".md") for target in targets} for targets in found]
    assert plain[:1] == plain[1:]


def test_the_pages_for_interviews_are_what_make_report_writes() -> None:
    for name, text in guides(kept(read_machines()), REPORTS).items():
        assert (REPORTS / name).read_text(encoding="utf-8") == text, f"reports/{name}: run `make report`"


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    here = ROOT / "README.md"
    assert len(wrong_links(here, "[a](none.md) [b](README.md#none) [`main`](Makefile#L99999)")) == 3
    assert wrong_links(here, "[`Engine.step`](common/engine.py#L1)") != []
    assert commands("Run `make nonsense`.\n```\necho hi | make stage1 chat  # talk\n```\n", "make") == [
        ["nonsense"],
        ["stage1", "chat"],
    ]
    assert "nonsense" not in known_words()
    assert unknown_options(["benchmarks", "compare", "--stages", "m0,m1", "--sweep"]) == []
    assert unknown_options(["benchmarks", "compare", "--swept"]) == ["--swept"]
    assert unknown_options(["benchmarks", "race"]) == ["race"]
    assert unknown_options(["stages.m7_gptq", "quantize", "--bits", "4", "--bats"]) == ["--bats"]
    notebook = tmp_path / "a.ipynb"
    cells = [{"cell_type": "markdown", "source": ["[a](none.md)\n", "x"]}, {"cell_type": "code", "source": "[b](c)"}]
    notebook.write_text(json.dumps({"cells": cells}))
    assert wrong_links(notebook, read(notebook)) == ["none.md: no such file"]
    assert len(TEXTS) > 10
