"""Every figure of the guide, the READMEs and the claims, derived again from the file that it is meant to be of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Results
from benchmarks.environment import ROOT
from benchmarks.peers import PEERS
from benchmarks.quality import name_of
from benchmarks.record import Record
from benchmarks.report.claims import CLAIMS
from benchmarks.report.figures import BEST_OF_4_BITS, DERIVED, evaluate
from benchmarks.report.readme import MARKED
from benchmarks.report.readme import PAGES as MARKED_PAGES
from benchmarks.report.sources import REPORTS, read_machines
from benchmarks.report.write import PAGES, TEMPLATES
from stages.m7_gptq.settings import Settings

FILES = {
    "cpu": {
        "single": "bench", "mixed": "bench", "ladder": "ladder", "arrivals": "arrivals", "decode": "decode",
        "memory_pressure": "memory", "memory_pressure[": "memory-blocks", "long_context": "long",
        "interference": "interference", "shared_prefix": "shared_prefix", "multi_turn": "multi_turn",
    },
    "h100": {
        "mixed": "gpu-ladder", "long_context": "long", "interference": "interference", "decode_one": "gpu-bench",
        "decode": "gpu-bench", "nano": "gpu-bench", "shared_prefix": "shared_prefix", "multi_turn": "multi_turn",
    },
    "h200": {
        "single": "single", "mixed": "gpu-ladder", "ladder": "gpu-ladder", "memory_pressure": "memory",
        "long_context": "long", "interference": "interference", "shared_prefix": "shared_prefix",
        "multi_turn": "multi_turn", "decode_one": "gpu-bench", "decode": "gpu-bench", "nano": "gpu-bench",
    },
}  # fmt: skip
"""Where a figure of a workload is meant to come from if it names no file; `[`: a point of its sweep, if elsewhere."""
SHIPPED = "int4 GPTQ, group 32, asymmetric"
"""The row of the weights that m7 makes unless told otherwise, as the claims name it."""
LEADING_GPU = "h200"


def expressions() -> Iterator[tuple[str, str]]:
    """(machine, expression) of everything that is filled from the kept results."""
    texts = [path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.md")]
    texts += [text for claim in CLAIMS for text in (claim.note, claim.why)]
    found = [match[1].strip() for text in texts for match in re.finditer(r"\{figure:([^{}|]+)", text)]
    marked = [*ROOT.glob("stages/m*/README.md"), *(ROOT / name for name in MARKED_PAGES if (ROOT / name).exists())]
    for path in marked:
        for match in MARKED.finditer(path.read_text(encoding="utf-8")):
            spaced = match[2].replace("~", " ").replace("/", " / ")
            found.append(re.sub(r"-1$", " - 1", re.sub(r"(^|:)1-", r"\g<1>1 - ", spaced)))
    found += [f"{machine}:{claim.figure}" for claim in CLAIMS for machine in FILES]
    for name in dict.fromkeys(found):
        machine, colon, rest = name.partition(":")
        yield (machine, rest.strip()) if colon else ("cpu", name)


@cache
def read(machine: str, stem: str) -> dict[str, Any]:
    return json.loads((REPORTS / machine / f"{stem}.json").read_text(encoding="utf-8"))


def row_of(machine: str, name: str, file: str) -> float | None:
    """One figure, from the row that has this meaning: stage, workload, point of the sweep, with execution or alone."""
    head, _, rest = name.partition(".")
    if head in ("quality", "attention") and not (REPORTS / machine / f"{head}.json").exists():
        return None
    if head == "quality":
        row, field = rest.rsplit(".", 1)
        every = read(machine, "quality")["rows"]
        found = [r for r in every if r["name"] == row] or [r for r in every if r["name"].startswith(row)]
        assert len(found) < 2
        return found[0][field] if found else None
    if head == "attention":
        backend, step, field = rest.split(".")
        [found] = [r for r in read(machine, "attention")["records"] if (r["backend"], r["step"]) == (backend, step)]
        return found[field]
    if head == "batches":
        stage, batch, way, field = rest.split(".")
        rows = read(machine, "batches")["records"]
        [found] = [r for r in rows if (r["stage"], r["batch"], r["sampling"]) == (stage, batch, way)]
        return found[field]
    if head == "prices":
        workload, stage, figure, field = rest.split(".")
        rows = read(machine, "cost_model")["rows"]
        [found] = [r for r in rows if (r["workload"], r["stage"], r["figure"]) == (workload, stage, figure)]
        return found[field]
    if head == "simulated":
        answer, case, field = rest.split(".")
        [found] = [r for r in read(machine, f"simulate-{answer}")["rows"] if r["case"] == case]
        return found[field]
    if head == "reference":
        return reference(machine, rest)
    workload, _, point = head.rstrip("]").partition("[")
    files = FILES[machine]
    stem = file or files.get(f"{workload}[" if point else workload) or files.get(workload, "")
    plain = ".plain." in name
    if plain and workload not in ("mixed", "ladder"):
        stem += "-plain"  # run with EXECUTION=plain
    if not (REPORTS / machine / f"{stem}.json").exists():
        return None
    values = read(machine, stem)
    chosen = values["config"].get("execution")
    assert file or (not values["config"].get("options") and chosen == ("plain" if stem.endswith("-plain") else None))
    peers = (peer for peer in (*PEERS, BEST_OF_4_BITS) if rest.startswith(f"{peer}."))
    stage = next(peers, rest.partition(".")[0])
    fields = rest.removeprefix(f"{stage}.").split(".")
    rows = values.get("sweeps" if point else "plain" if plain and not chosen else "records", [])
    rows = [r for r in rows if r["workload"] == workload and r["status"] == "ok" and (r.get("variant") or "") == point]
    if stage == "last":
        stages = [r["stage"] for r in values["records"] if re.fullmatch(r"m\d", r["stage"])]
        stage = max(stages) if stages and len(rows) > 1 else ""
    names = {"llama.cpp": "llama.cpp Q4_1"}  # older files
    found = [(names.get(r["stage"], r["stage"]), r) for r in rows]
    rows = [r for name, r in found if name == stage or (stage == BEST_OF_4_BITS and stage in name)]
    if stage == BEST_OF_4_BITS:
        rows = sorted(rows, key=lambda r: r["output_tokens_per_s"])[-1:]
    assert len(rows) < 2
    if not rows:
        return None
    value: Any = rows[0]
    for field in fields[plain:]:
        if field in DERIVED:
            return DERIVED[field](Record(**rows[0]), Results.read(REPORTS / machine / f"{stem}.json"))
        value = value.get(field) if value is not None else None
    impossible = fields[-1] == "attention_time_s" and value is not None and value > rows[0]["e2e_s"]["max"]
    return None if impossible else value


def reference(machine: str, rest: str) -> float | None:
    engine, workload, *how = rest.split(".")
    if engine == "limit" and (REPORTS / machine / "gpu-limits.json").exists():
        [row] = [r for r in read(machine, "gpu-limits")["records"] if r["workload"] == workload]
        return row["output_tokens_per_s"]
    if not (REPORTS / "peers" / f"{machine}.json").exists():
        return None
    same = {"nano": {"workload": "nano", "seed": 0}, "decode_one": {"workload": "decode", "batch": 1}}
    wanted = same.get(workload, {"workload": "decode", "batch": 64})
    wanted |= {"engine": engine, "temperature": 0.6 if how else 0.0}
    rows = [r for r in read("peers", machine)["results"] if all(r.get(k) == v for k, v in wanted.items())]
    assert len(rows) == 1 and rows[0].get("output_len", 512) == 512
    return rows[0]["output_tokens_per_s"]


def derived(machine: str, expression: str) -> float | None:
    for alternative in expression.split(" or "):
        ratio, _, file = alternative.partition("@")
        names = ratio.removeprefix("1 - ").removesuffix(" - 1").split(" / ")
        values = [row_of(machine, name.strip(), file) for name in names]
        if None not in values:
            first, second = [*values, 1.0][:2]
            assert first is not None and second
            value = 1 - first / second if ratio.startswith("1 - ") else first / second
            return value - 1 if ratio.endswith(" - 1") else value
    return None


def test_every_figure_is_of_the_row_that_it_is_meant_to_be_of() -> None:
    machines = read_machines()
    every = sorted(expressions())
    assert len(every) > 250
    for machine, expression in every:
        assert evaluate(machines[machine], expression) == pytest.approx(derived(machine, expression)), (
            machine,
            expression,
        )


def test_what_is_said_of_m7_is_of_the_weights_that_it_makes() -> None:
    """Must not be the best row: act-order loses less, and m7 does not use it."""
    assert name_of(Settings(), hidden=576) == SHIPPED
    assert any(f"quality.{SHIPPED}." in claim.figure for claim in CLAIMS)
    for path in TEMPLATES.glob("interview_guide*.md"):
        names = re.findall(r"quality\.(int4 GPTQ[^.]*)\.", path.read_text(encoding="utf-8"))
        assert {*names} == {SHIPPED, f"{SHIPPED}, act-order"}
        assert names.count(f"{SHIPPED}, act-order") == 1


HOLDS = {
    "paging alone lost to slots": "h200:mixed.m3.plain.output_tokens_per_s < mixed.m2.plain.output_tokens_per_s",
    "the long prompt pays": "cpu:interference.m4.ttft_by_group.long.p50 < interference.m5.ttft_by_group.long.p50",
    "the short one too": "cpu:interference.m4.ttft_by_group.short.p50 < interference.m5.ttft_by_group.short.p50",
    "a prompt that joins stalls decodes": "cpu:mixed.m1.itl_s.p99 < mixed.m2.itl_s.p99",
    "SDPA prefills faster": "h200:attention.triton.prefill 1 × 4096.share < attention.torch.prefill 1 × 4096.share",
    "no more than waste": "h200:mixed.m2.plain.output_tokens_per_s / mixed.m1.output_tokens_per_s < "
    "mixed.m1.padding_bound",
    "m7 loses at 64 requests": "h200:decode.m7.output_tokens_per_s < decode.m6.output_tokens_per_s",
    "and gains at one": "h200:decode_one.m6.output_tokens_per_s < decode_one.m7.output_tokens_per_s",
}  # fmt: skip


@pytest.mark.parametrize("sentence", HOLDS)
def test_what_the_guide_says_of_a_direction_holds(sentence: str) -> None:
    machine, _, comparison = HOLDS[sentence].partition(":")
    low, high = (evaluate(read_machines()[machine], side) for side in comparison.split(" < "))
    assert low is not None and high is not None and low < high


def test_versions_in_the_texts_are_those_that_were_measured() -> None:
    peers = read_machines()[LEADING_GPU].peers
    assert peers is not None
    assert peers.title("vllm").startswith("vLLM 0.26.")
    for path in TEMPLATES.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert {*re.findall(r"vLLM (\d[\d.]*\d)", text)} <= {"0.26"}, path
        if "figure:h100:" in text:
            assert not re.search(r"figure:h100:(?!long_context\.)", text), "of a GPU the texts have one machine"


def test_no_template_is_forgotten() -> None:
    names = {f"{name}{ending}" for page in PAGES.values() for name in page for ending in (".md", ".zh-CN.md")}
    here = {path.name for path in Path(TEMPLATES).glob("*.md")}
    assert here - names == {"stages.md", "stages.zh-CN.md"}
