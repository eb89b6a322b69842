"""The figures of a race, and the sentence at its end."""

from __future__ import annotations

import pytest

from common.arena.figures import FIGURES, Figures, shown, verdict


def test_two_answers_step_by_step() -> None:
    figures = Figures(total=2)
    figures.arrivals.update({0: 0.0, 1: 0.5})
    figures.step(0.2, [(0, 1)], 0, running=1, reserved=16)
    figures.step(0.3, [(0, 1)], 0, running=1, reserved=16)
    figures.step(1.0, [(0, 1), (1, 1)], 1, running=2, reserved=48)
    now = figures.now()
    assert now["speed"] == 4.0  # the four tokens of the last second
    assert now["ttft"] == 0.35  # the median of 0.2 and 0.5
    assert now["gap"] == 0.7  # between two tokens of the first answer
    assert (now["together"], now["memory"], now["done"], now["total"], now["tokens"]) == (2, 48, 1, 2, 4)
    figures.step(1.9, [(1, 1)], 1, running=1, reserved=16)
    assert figures.now()["speed"] == 3.0  # of what came at 1.0 and later
    assert figures.at_the_end(2.0)["speed"] == 2.5
    assert figures.at_the_end(2.0)["memory"] == 48


def test_before_the_first_token_there_is_nothing_to_say() -> None:
    figures = Figures(total=1)
    assert figures.now() | {"ttft": None, "gap": None, "speed": 0.0} == figures.now()
    assert shown("ttft", None) == "–"


@pytest.mark.parametrize(
    ("watch", "first", "second", "says"),
    [
        ("speed", 20.0, 50.0, "Output: m1 20 tokens/s, m5 50 tokens/s. m5: 2.5 times m1's."),
        ("gap", 0.9, 0.05, "Longest pause: m1 0.90 s, m5 50 ms. m5: 0.056 times m1's."),
        ("memory", 3072, 1024, "KV memory, peak: m1 3,072 tokens, m5 1,024 tokens. m5: 0.33 times m1's."),
        ("ttft", 1.0, 1.02, "First token, median: m1 1.00 s, m5 1.02 s. Within 5 %: no difference to speak of."),
        ("time", 1.0, 1.5, "Time: m1 1.00 s, m5 1.50 s. m5: 1.5 times m1's."),
        ("together", 1, 3, "Most at once: m1 1 answer, m5 3 answers. m5: 3.0 times m1's."),
        ("peak", 30.0, 0.0, "Most memory that a step took: m1 30 MB, m5 0 MB."),
        ("gap", None, 0.5, "Longest pause: m1 –, m5 0.50 s."),
    ],
)
def test_the_verdict_names_the_figures_and_the_ratio_of_the_last_to_the_first(
    watch: str, first: float | None, second: float, says: str
) -> None:
    assert verdict(watch, [("m1", {watch: first}), ("m5", {watch: second})]) == says


def test_a_verdict_on_three_is_not_that_of_two_alike() -> None:
    ends = [("m1", {"speed": 10.0}), ("m2", {"speed": 30.0}), ("m5", {"speed": 10.1})]
    assert verdict("speed", ends).endswith("m5: 1.0 times m1's.")


def test_every_figure_is_among_those_that_are_told() -> None:
    assert set(FIGURES) <= set(Figures(1).now())
