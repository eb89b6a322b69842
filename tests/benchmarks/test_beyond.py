"""The arithmetic of the pages for interviews: derived a second time, in another way; and the pages themselves."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from benchmarks.report.arithmetic import MODELS, compute
from benchmarks.report.fill import PLACEHOLDER, Filler
from benchmarks.report.sources import REPORTS, Machine, Sheet, kept, read_machines
from benchmarks.report.write import TEMPLATES, guides
from common.config import EngineConfig
from common.errors import UserError
from common.models.load import open_source

PAGES = ("interview_beyond", "interview_tomorrow")
COPY, MATMUL = 4e12, 700e12


def machine(name: str = "h200") -> Machine:
    """One that was measured to copy 4,000 GB/s and to multiply 700 TFLOP/s, and nothing else."""
    ceilings = {"copy_gb_per_s": COPY / 1e9, "matmul_tflop_per_s": MATMUL / 1e12}
    return Machine(name, name, sheets=[Sheet(Path("attention.json"), "attention", {"ceilings": ceilings}, [])])


def shown(expression: str, form: str = "n") -> str:
    return Filler({"h200": machine()}, "h200", REPORTS).fill(f"{{compute:{expression}|{form}}}")


@cache
def pages() -> dict[str, str]:
    return guides(kept(read_machines()), REPORTS)


def template(page: str, ending: str = ".md") -> str:
    return (TEMPLATES / f"{page}{ending}").read_text(encoding="utf-8")


def test_the_shapes_are_those_of_the_models() -> None:
    """Qwen3-0.6B has 596 million weights (without the embedding, which is the head); SmolLM2-135M is counted from its
    own file, and as bytes by the quality lab; Llama 3 70B has 70.6 billion with its embedding."""
    config = EngineConfig()
    embedded = open_source(config.model, config.torch_device, progress=None).config
    smol = MODELS["smol"]
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ):
        assert getattr(smol, name) == getattr(embedded, name), name
    rows = json.loads((REPORTS / "cpu" / "quality.json").read_text())["rows"]
    assert smol.read == next(row["model_bytes"] for row in rows if row["name"] == "bf16")
    assert round(MODELS["qwen"].read / 2 / 1e6) == 596
    large = MODELS["llama70b"]
    assert round((large.read / 2 + large.head) / 1e9, 1) == 70.6


@pytest.mark.parametrize(
    ("expression", "form", "expected"),
    [
        ("qwen.kv", "n", "114,688"),  # 2 x 28 x 8 x 128 x 2
        ("smol.kv", "n", "23,040"),  # 2 x 30 x 3 x 64 x 2
        ("llama70b.kv", "n", "327,680"),  # 2 x 80 x 8 x 128 x 2
        ("qwen.scores", "n", "229,376"),  # QK and PV: 2 x 2 x 28 x 16 x 128
        ("4096 * qwen.kv", "size", "470 MB"),
        ("matmul / copy", "n", "175"),
        ("qwen.read / copy", "us", "298 µs"),
        ("qwen.vocab_size / 8", "n", "18,992"),
        ("576 / (2 * 128)", "ppl", "2.25"),  # DeepSeek-V2, section 2.1.4: "GQA with only 2.25 groups"
        ("100 - 100 * 60 * 576 * 6 / (95 * 2 * 8 * 128 * 16)", "rate", "93.3"),  # its abstract
    ],
)
def test_what_is_computed(expression: str, form: str, expected: str) -> None:
    assert shown(expression, form) == expected


def test_a_figure_may_be_part_of_it() -> None:
    kept_cpu = kept(read_machines())["cpu"]
    gaps = [compute(kept_cpu, f"<interference.m5.itl_s.{which}>") for which in ("p99", "p50")]
    assert compute(kept_cpu, "<interference.m5.itl_s.p99> / <interference.m5.itl_s.p50>") == gaps[0] / gaps[1] > 1


def test_what_was_not_measured_names_its_command() -> None:
    nothing = {"h200": Machine("h200", "H200"), "cpu": Machine("cpu", "CPU")}
    filler = Filler(nothing, "cpu", REPORTS)
    assert "python -m benchmarks attention" in filler.fill("{compute:h200:qwen.read / copy|s}")
    assert "WORKLOAD=arrivals" in filler.fill("{compute:<arrivals.m1.e2e_s.mean> * 2|s}")
    assert filler.fill("{compute:2 * qwen.kv|n}") == "229,376"


def test_the_readers_own_ceilings_come_first_and_kept_ones_are_marked() -> None:
    own, other = machine("local"), Machine("local", "mine")
    assert Filler({"local": own, "cpu": machine("cpu")}, "local", REPORTS, fallback="cpu").fill(
        "{compute:matmul / copy|n}"
    ) == ("175")
    filled = Filler({"local": other, "cpu": machine("cpu")}, "local", REPORTS, fallback="cpu")
    assert filled.fill("{compute:matmul / copy|n}") == "175†"


@pytest.mark.parametrize("wrong", ["qwen.kv *", "gpt.kv", "qwen.nothing"])
def test_what_cannot_be_computed_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="correct the placeholder"):
        compute(machine(), wrong)


def test_distinct_experts_as_drawn() -> None:
    """128 experts, 8 for each of 16 tokens: the formula of B5 against draws."""
    generator = random.Random(0)
    draws = 1_000
    touched = sum(len({e for _ in range(16) for e in generator.sample(range(128), 8)}) for _ in range(draws)) / draws
    assert touched == pytest.approx(128 * (1 - (1 - 8 / 128) ** 16), rel=0.01)


def test_rejection_sampling_gives_the_target() -> None:
    """B3's proof, in numbers: accepted mass plus residual is p; resampling from p is not."""
    generator = random.Random(1)
    p, q = ([generator.random() ** 3 for _ in range(50)] for _ in range(2))
    p, q = ([x / sum(d) for x in d] for d in (p, q))
    accepted = [b * min(1, a / b) for a, b in zip(p, q, strict=True)]
    beta = 1 - sum(accepted)
    residual = [max(a - b, 0) / beta for a, b in zip(p, q, strict=True)]
    assert sum(residual) == pytest.approx(1)
    assert [x + beta * r for x, r in zip(accepted, residual, strict=True)] == pytest.approx(p)
    assert max(abs(x + beta * a - a) for x, a in zip(accepted, p, strict=True)) > 0.01
    a, k = 0.8, 4
    by_outcome = sum((n + 1) * a**n * (1 - a) for n in range(k)) + (k + 1) * a**k  # n accepted, then one more
    assert (1 - a ** (k + 1)) / (1 - a) == pytest.approx(by_outcome)


def test_the_whole_steps_intensity_never_reaches_the_ridge() -> None:
    """B1: operations over bytes of a decode step with 1,024 tokens of context, at 1 to 100,000 requests."""
    qwen = MODELS["qwen"]
    operations, kv = qwen.flops + 2 * qwen.head + 1024 * qwen.scores, 1024 * qwen.kv
    intensities = [b * operations / (qwen.read + b * kv) for b in (1, 16, 256, 100_000)]
    assert intensities == sorted(intensities)
    assert round(intensities[-1]) == round(operations / kv) == 12 < 989 / 4.8


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same(page: str) -> None:
    """The same arithmetic, figures and lines of code, each as often."""
    kinds = ("compute", "figure", "code")
    found = [
        Counter(m[0] for m in PLACEHOLDER.finditer(template(page, end)) if m[1] in kinds)
        for end in (".md", ".zh-CN.md")
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 40


@pytest.mark.parametrize("ending", [".md", ".zh-CN.md"])
def test_ten_questions_and_forty_terms(ending: str) -> None:
    guide, tomorrow = pages()[f"interview_guide{ending}"], pages()[f"interview_tomorrow{ending}"]
    asked = re.findall(r"^### B(\d+): ", guide, flags=re.M)
    assert asked == [str(n) for n in range(1, 11)]
    for text in (guide, tomorrow):
        assert "{" not in re.sub(r"`[^`]*`", "", text)
    terms = re.split(r"^## ", tomorrow, flags=re.M)[5]
    assert len(re.findall(r"^\| (?!---)", terms, flags=re.M)) - 1 == 40  # without the table's head


LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, MLP, VOCABULARY = 28, 16, 8, 128, 1024, 3072, 151_936
"""Qwen3-0.6B, from its config.json."""


def weights() -> tuple[int, int]:
    """Of its layers (with the norms) and of its output head, counted matrix by matrix."""
    attention = HIDDEN * (HEADS + 2 * KV_HEADS) * DIM + HEADS * DIM * HIDDEN
    return LAYERS * (attention + 3 * HIDDEN * MLP + 2 * HIDDEN + 2 * DIM) + HIDDEN, VOCABULARY * HIDDEN


def worked_out() -> list[str]:
    """What the part beyond the fifteen must say, each from the model's sizes and without the template's formulas."""
    layers, head = weights()
    kv = 2 * LAYERS * KV_HEADS * DIM * 2
    distinct = [sum(1 - (120 / 128) ** tokens for _ in range(128)) for tokens in (16, 64)]
    moved = sum(2 * 8 * HIDDEN * 2 for _ in range(LAYERS))
    codes = layers * 4 / 8 + layers / 128 * 2 + layers / 128 / 2  # codes, scales of two bytes, zeros of half a byte
    drafted = [sum(a**n for n in range(5)) / (1 + 4 * 0.1) for a in (0.8, 0.5)]
    return [
        f"| {2 * kv:,} | {2 * kv * 32768 / 1e9:.1f} GB | {2 * 2 * 30 * 9 * 64:,} |",  # MHA: twice as many heads
        f"| **{kv:,}** | {kv * 32768 / 1e9:.1f} GB | **{2 * 2 * 30 * 3 * 64:,}** |",
        f"| {2 * 2 * LAYERS * DIM:,} | {2 * 2 * LAYERS * DIM * 32768 / 1e6:.0f} MB | {2 * 2 * 30 * 64:,} |",
        f"| {2 * LAYERS * (512 + 64):,} | {2 * LAYERS * 576 * 32768 / 1e9:.1f} GB | {2 * 30 * 576:,} |",
        f"{2 * (layers + head) // kv:,} tokens of context",
        f"{576 / (2 * 128 * 128) * 100:.1f} % of MHA",
        f"an intensity of {2 * 128 * (576 + 512) / (576 * 2):.0f},",
        f"{sum(0.8**n for n in range(5)):.1f}.",
        f"speed-up is {drafted[0]:.1f}; with a = 0.5, {drafted[1]:.2f}",
        f"a step has {64 * (4 + 1)} rows",
        f"| NVLink of an H100 or H200, 450 GB/s | {4096 * kv / 450e9 * 1e3:.1f} ms |",
        f"| InfiniBand NDR, 400 Gbit/s | {4096 * kv * 8 / 400e9 * 1e3:.1f} ms |",
        f"| Ethernet, 100 Gbit/s | {4096 * kv * 8 / 100e9 * 1e3:.1f} ms |",
        f"{kv * 1e9 / (2 * layers):,.0f} bytes of K and V for each GFLOP",
        f"| 16 | {distinct[0]:.0f} | {16 * 8 / distinct[0]:.2f} | {distinct[0] / 16:.1f} experts |",
        f"| 64 | {distinct[1]:.0f} | {64 * 8 / distinct[1]:.1f} | {distinct[1] / 64:.2f} experts |",
        f"{989 / 4.8 * 16:,.0f} tokens in a step",
        f"{moved / 1e3:.0f} kB a token, for a step of 64 tokens {64 * moved / 1e6:.0f} MB: {moved * 64 / 450e3:.0f} µs",
        f"the {2 * LAYERS} exchanges in a row are: at 10 µs each, {2 * LAYERS * 10} µs",
        f"head in 8 bits {(codes + head) / 1e6:.0f} MB, a ceiling of {2 * (layers + head) / (codes + head):.1f} times",
        f"/ 8 = {VOCABULARY // 8:,} bytes; for 64 requests {VOCABULARY * 8 / 1e6:.1f} MB, {VOCABULARY / 8e3:.0f} µs",
        f"in Qwen3-0.6B's shape is {16 * kv / 1e6:.1f} MB",
        f"| Qwen3-0.6B | {kv:,} | {2 * layers / 1e9:.2f} |",
        f"| {kv:,} | {(2 * layers + 4096 * 2 * 2 * LAYERS * HEADS * DIM) / 1e9:.2f} |",
    ]


def test_the_page_says_what_was_worked_out() -> None:
    text = " ".join(pages()["interview_guide.md"].split())
    assert [phrase for phrase in worked_out() if phrase not in text] == []
