"""The interview guides against the collection of questions, one by one, in both languages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.report.sources import REPORTS, kept, read_machines
from benchmarks.report.write import TEMPLATES, guides
from tests.benchmarks.questions import FOLLOW_UPS, MENTIONED, NUMBERED, SAID, TERMS, WITHIN

GUIDES = ("interview_guide.zh-CN.md", "interview_guide.md")
both = pytest.mark.parametrize("language", [0, 1], ids=["zh", "en"])


@cache
def guide(language: int) -> str:
    """Without the part beyond the collection, where there is one."""
    text = guides(kept(read_machines()), REPORTS)[GUIDES[language]]
    beyond = TEMPLATES / GUIDES[language].replace("guide", "beyond")
    return text.partition(f"\n{beyond.read_text(encoding='utf-8').splitlines()[0]}\n")[0] if beyond.exists() else text


def answers(language: int) -> dict[str, str]:
    """By `Q7: the question`, with the numbered ones; and by `7`, the follow-ups, with their question at the start."""
    head, _, tail = guide(language).partition("\n## 追问方向\n" if language == 0 else "\n## Follow-ups\n")
    parts = re.split(r"^### (.+)$", head, flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    parts = re.split(r"^(\d+)\. (?=\*\*)", tail, flags=re.M)
    return found | dict(zip(parts[1::2], parts[2::2], strict=True))


@both
def test_every_question_is_answered(language: int) -> None:
    found = answers(language)
    numbered = [f"{name}: {question[language]}" for name, question in NUMBERED.items()]
    assert list(found) == [*numbered, *map(str, FOLLOW_UPS)]
    for number, question in FOLLOW_UPS.items():
        assert re.match(rf"\*\*[“\"]{re.escape(question[language])}[”\"]\*\*", found[str(number)])
    for name, answer in found.items():
        assert len(answer) > 80, name
    text = " ".join(guide(language).split())
    for name, words in WITHIN.items():
        assert words[language] in text, name


@both
def test_what_the_stages_leave_out_is_mentioned(language: int) -> None:
    """Must not be passed over."""
    found = {name.split(":")[0]: " ".join(answer.split()) for name, answer in answers(language).items()}
    for name, words in MENTIONED.items():
        assert [word for word in words if word.lower() not in found[name].lower()] == [], name


@both
def test_an_answer_uses_the_terms_of_the_field(language: int) -> None:
    found = {name.split(":")[0]: " ".join(answer.split()) for name, answer in answers(language).items()}
    for name, terms in TERMS.items():
        words = [term if isinstance(term, str) else term[language] for term in terms]
        assert [word for word in words if word.lower() not in found[name].lower()] == [], name


@both
def test_every_answer_points_at_code(language: int) -> None:
    """Where there is code to point at: not why one chose the project, nor how one prepares."""
    for name, answer in answers(language).items():
        assert name.startswith("Q2:") or "](../" in answer or "report.md" in answer, name


def test_both_languages_say_the_same() -> None:
    """The same figures, the same lines of code, as many corrections; and Chinese of a length that says as much."""
    zh, en = (answers(language) for language in (0, 1))
    for (question, short), long in zip(zh.items(), en.values(), strict=True):
        short, long = (re.sub(r"\]\([^)]*\)", "]", text) for text in (short, long))
        assert len(short) > 0.3 * len(long), question
    templates = [(TEMPLATES / name).read_text(encoding="utf-8") for name in GUIDES]
    placeholders = [sorted(set(re.findall(r"\{(?:code|figure):[^|}]+", text))) for text in templates]
    assert placeholders[0] == placeholders[1]
    corrections = [len(re.findall(r"Correction[.:]\*\*|更正[。：]\*\*", text)) for text in templates]
    assert corrections[0] == corrections[1] >= 14


@both
def test_no_placeholder_is_left_and_every_figure_is_of_this_machine(language: int) -> None:
    assert "{" not in re.sub(r"`[^`]*`", "", guide(language))
    assert "†" not in guide(language).partition("\n## ")[2]
    assert not re.search("not measured yet|尚未测量", guide(language))
    template = (TEMPLATES / GUIDES[language]).read_text(encoding="utf-8")
    assert not re.search(r"^\s*\{figure", template, flags=re.M), (
        "a figure that begins a line may read as a list's number"
    )


@both
def test_what_was_once_said_wrong_is_said_right(language: int) -> None:
    """Must not be: the whole run's attention as the kernel's; a price or an opponent left out; a limit that is none."""
    found = {name.split(":")[0]: " ".join(answer.split()) for name, answer in answers(language).items()}
    for name, words in SAID.items():
        assert [word[language] for word in words if word[language] not in found[name]] == [], name
    assert not re.search("bound by arithmetic|大 batch 的瓶颈是计算", found["Q10"])
    assert not re.search("layers and head_dim have no say|与层数、head_dim 无关", found["2"])


def test_a_page_is_its_templates_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled alike: the part beyond the collection behind the guide, the page for tomorrow for itself."""
    monkeypatch.setattr("benchmarks.report.write.TEMPLATES", tmp_path)
    figure = "{figure:mixed.m2.output_tokens_per_s|rate}"
    for name in ("interview_guide.md", "interview_guide.zh-CN.md"):
        (tmp_path / name).write_text("# Guide\n")
    assert guides(kept(read_machines()), REPORTS) == dict.fromkeys(reversed(GUIDES), "# Guide\n")
    (tmp_path / "interview_beyond.md").write_text(f"## Beyond\n\nm2: {figure}\n")
    (tmp_path / "interview_tomorrow.zh-CN.md").write_text(f"m2：{figure}\n")
    found = guides(kept(read_machines()), REPORTS)
    assert re.fullmatch(r"# Guide\n\n## Beyond\n\nm2: [\d.,]+\n", found["interview_guide.md"])
    assert re.fullmatch(r"m2：[\d.,]+\n", found["interview_tomorrow.zh-CN.md"])
    assert list(found) == [*reversed(GUIDES), "interview_tomorrow.zh-CN.md"]
