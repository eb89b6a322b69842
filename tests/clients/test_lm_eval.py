"""The questions for lm_eval are whole, and what its runner reads from its results is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import UserError
from tests.clients.lm_eval.__main__ import SCORES, compare, read_results, versions
from tests.clients.lm_eval.items import CHOICES, FOLDER, QUOTES


def test_there_are_enough_questions_and_each_has_one_right_answer() -> None:
    choices, quotes = ([json.loads(line) for line in path.read_text().splitlines()] for path in (CHOICES, QUOTES))
    assert len(choices) >= 200 and len(quotes) >= 50
    assert len({item["passage"] + item["choices"][item["answer"]] for item in choices}) == len(choices)
    for item in choices:
        assert len(set(item["choices"])) == 4 and all(item["choices"]) and 0 <= item["answer"] < 4
    assert max([item["answer"] for item in choices].count(place) for place in range(4)) < len(choices) / 3
    for item in quotes:
        assert f"{item['opening']} {item['rest']}." in item["passage"]
    for task in SCORES:
        assert f"lm_eval/{task}.jsonl" in (FOLDER / f"{task}.yaml").read_text()


def test_answers_are_paired_by_question(tmp_path: Path) -> None:
    results = {task: {"alias": task, f"{score},none": 0.5} for task, score in SCORES.items()}
    (tmp_path / "results_1.json").write_text(json.dumps({"results": results}))
    for (task, score), name in zip(SCORES.items(), ("none", "exact"), strict=True):
        lines = [{"doc_id": 1, score: 0.0, "filter": name}, {"doc_id": 0, score: 1.0, "filter": name}]
        lines.append({"doc_id": 0, score: 0.0, "filter": "regex"})
        (tmp_path / f"samples_{task}_1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores, right = read_results(tmp_path)
    assert right == {task: [True, False] for task in SCORES}
    assert scores == {task: {f"{score},none": 0.5} for task, score in SCORES.items()}


def test_the_difference_has_the_error_of_pairs() -> None:
    found = compare([True] * 60 + [False] * 40, [True] * 50 + [False] * 48 + [True] * 2)
    assert (found["both"], found["only_m6"], found["only_m7"], found["neither"]) == (50, 10, 2, 38)
    assert found["m7_minus_m6"] == pytest.approx(-0.08)
    assert found["stderr"] == pytest.approx(((0.12 - 0.08**2) / 100) ** 0.5)


def test_an_environment_without_lm_eval_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be run"):
        versions(str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match=r"pip install 'lm_eval\[api\]' transformers"):
        versions(str(tmp_path / "python"))
