"""Iteration-level scheduling, one plan at a time, without a model."""

from __future__ import annotations

from common import EngineConfig, SamplingParams
from common.plan import StepPlan
from common.request import Request, SampledToken
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m2_continuous_batching.scheduler import ContinuousScheduler
from tests.steps import same


class Steps:
    """A scheduler, stepped by hand. Requests are called a, b, c, ... in order of arrival."""

    def __init__(self, slots: int = 8, **options: int) -> None:
        config = EngineConfig(device="cpu", **options)  # type: ignore[arg-type]
        self.scheduler = ContinuousScheduler(SlotCache(slots, 64), config)
        self.count = 0
        self.planned: StepPlan | None = None

    def add(self, prompt: int, output: int = 9) -> None:
        name = "abcdefgh"[self.count]
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        self.scheduler.add(Request(name, [1] * prompt, params, frozenset(), 0, 0.0, number=self.count))
        self.count += 1

    def plan(self) -> list[str]:
        """The next step, as in ["a 4", "b 6"]: whose tokens, and how many."""
        self.planned = self.scheduler.plan()
        return [f"{c.request.id} {c.length}" for c in self.planned.chunks] if self.planned else []

    def step(self) -> list[str]:
        planned = self.plan()
        if self.planned:
            self.scheduler.update(self.planned, {c.request.id: SampledToken(1) for c in self.planned.chunks})
        return planned


def test_nothing_to_do_is_no_plan() -> None:
    same("`plan()` without a request", Steps().scheduler.plan(), None)


def test_newcomers_start_together_with_whole_prompts() -> None:
    steps = Steps()
    steps.add(4), steps.add(6)
    same("the first step: prompts of 4 and 6 tokens have arrived", steps.step(), ["a 4", "b 6"])
    same("who runs then", [request.id for request in steps.scheduler.running], ["a", "b"])


def test_every_running_request_gets_one_token() -> None:
    steps = Steps()
    steps.add(4), steps.add(6)
    steps.step()
    same("the second step, nobody waits", steps.step(), ["a 1", "b 1"])
    same("the third step", steps.step(), ["a 1", "b 1"])


def test_a_newcomer_joins_the_next_step() -> None:
    steps = Steps()
    steps.add(4)
    steps.step()
    steps.add(3)
    same("the step after b has arrived, while a runs: prefill first", steps.step(), ["b 3"])
    same("the step after that", steps.step(), ["a 1", "b 1"])


def test_the_token_budget_is_shared() -> None:
    steps = Steps(max_num_batched_tokens=10)
    for prompt in (4, 6, 1):
        steps.add(prompt)
    same("the first step: prompts of 4, 6 and 1, 10 tokens a step", steps.step(), ["a 4", "b 6"])
    same("the second step", steps.step(), ["c 1"])


def test_a_prompt_over_the_budget_goes_alone() -> None:
    steps = Steps(max_num_batched_tokens=10)
    steps.add(25), steps.add(3)
    same("the first step: prompts of 25 and 3, 10 tokens a step", steps.step(), ["a 25"])
    same("the second step", steps.step(), ["b 3"])


def test_no_more_requests_run_than_max_num_seqs() -> None:
    steps = Steps(max_num_seqs=2)
    for _ in range(3):
        steps.add(3)
    same("the first step: 3 prompts, max_num_seqs=2", steps.step(), ["a 3", "b 3"])
    same("the second step", steps.step(), ["a 1", "b 1"])


def test_a_request_without_a_slot_waits() -> None:
    steps = Steps(slots=1)
    steps.add(3), steps.add(3)
    same("the first step: 2 prompts, 1 slot", steps.step(), ["a 3"])
    same("who waits", [request.id for request in steps.scheduler.waiting], ["b"])


def test_a_place_is_taken_again_as_soon_as_it_is_free() -> None:
    steps = Steps(max_num_seqs=2)
    steps.add(3, output=1), steps.add(3, output=5), steps.add(3)
    steps.step()
    same("the step after a has ended: c takes its place while b runs on", steps.step(), ["c 3"])


def test_a_request_whose_last_token_is_in_flight_is_left_out() -> None:
    """Two plans without an update between them, as a loop makes that plans ahead."""
    steps = Steps()
    steps.add(3, output=1), steps.add(3, output=5)
    steps.plan()
    same("the plan made while a's last token is being computed", steps.plan(), ["b 1"])
