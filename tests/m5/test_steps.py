"""Chunked prefill, one plan at a time, without a model."""

from __future__ import annotations

from common import EngineConfig, SamplingParams
from common.plan import StepPlan
from common.request import Request, SampledToken
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler
from tests.steps import same


class Steps:
    """A scheduler, stepped by hand. Requests are called a, b, c, ... in order of arrival."""

    def __init__(self, blocks: int = 64, block_size: int = 4, **options: int) -> None:
        config = EngineConfig(device="cpu", block_size=block_size, **options)  # type: ignore[arg-type]
        self.scheduler = ChunkedScheduler(PagedCache(blocks, block_size), config)
        self.count = 0
        self.preempted: list[str] = []

    def add(self, prompt: int, output: int = 30) -> None:
        name = "abcdefgh"[self.count]
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        self.scheduler.add(Request(name, [1] * prompt, params, frozenset(), 0, 0.0, number=self.count))
        self.count += 1

    def step(self) -> list[str]:
        """The next step, as in ["a 1", "b 6"]: whose tokens, and how many."""
        plan: StepPlan | None = self.scheduler.plan()
        if plan is None:
            return []
        self.preempted = [request.id for request in plan.preempted]
        self.scheduler.update(plan, {c.request.id: SampledToken(1) for c in plan.chunks if c.samples})
        return [f"{c.request.id} {c.length}" for c in plan.chunks]


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    steps = Steps(max_num_batched_tokens=50, prefill_chunk_size=10)
    steps.add(80)
    same("the first step: a prompt of 80, 50 tokens a step, no decodes", steps.step(), ["a 50"])


def test_a_prompt_goes_on_where_it_stopped() -> None:
    steps = Steps(max_num_batched_tokens=50, prefill_chunk_size=10)
    steps.add(120)
    same("two steps of a prompt of 120, 50 tokens a step", [steps.step(), steps.step()], [["a 50"], ["a 50"]])


def test_decodes_come_first_and_a_chunk_beside_them() -> None:
    steps = Steps(max_num_batched_tokens=50, prefill_chunk_size=10)
    steps.add(3)
    steps.step()
    steps.add(25)
    got = [steps.step() for _ in range(4)]
    same("steps of a decode and a prompt of 25, chunk size 10", got,
         [["a 1", "b 10"], ["a 1", "b 10"], ["a 1", "b 5"], ["a 1", "b 1"]])  # fmt: skip


def test_decodes_are_a_part_of_the_budget() -> None:
    steps = Steps(max_num_batched_tokens=8, max_num_seqs=8, prefill_chunk_size=100)
    for _ in range(2):
        steps.add(2)
        steps.step()
    steps.add(30)
    same("a step with 2 decodes and a prompt of 30, 8 tokens a step", steps.step(), ["a 1", "b 1", "c 6"])


def test_the_rest_of_a_chunk_goes_to_the_next_prompt() -> None:
    steps = Steps(max_num_batched_tokens=50, prefill_chunk_size=10)
    steps.add(3)
    steps.step()
    steps.add(6), steps.add(9)
    same("a step with a decode and prompts of 6 and 9, chunk size 10", steps.step(), ["a 1", "b 6", "c 4"])
    same("the next step", steps.step(), ["a 1", "b 1", "c 5"])


def test_a_prompt_under_way_comes_before_newcomers() -> None:
    steps = Steps(max_num_batched_tokens=10, max_num_seqs=8)
    steps.add(15)
    steps.step()
    steps.add(8)
    same("the second step of a prompt of 15, a prompt of 8 has arrived, 10 tokens a step", steps.step(), ["a 5", "b 5"])


def test_admission_takes_blocks_for_the_whole_prompt() -> None:
    steps = Steps(blocks=10, max_num_batched_tokens=8, max_num_seqs=4)
    steps.add(20), steps.add(20)
    same("the first step: 2 prompts of 20, 10 blocks of 4", steps.step(), ["a 8"])
    same("blocks that a holds", len(steps.scheduler.cache.tables["a"]), 5)


def test_no_more_requests_run_than_max_num_seqs() -> None:
    steps = Steps(max_num_seqs=2)
    for _ in range(3):
        steps.add(3)
    same("the first step: 3 prompts, max_num_seqs=2", steps.step(), ["a 3", "b 3"])
    same("the second step", steps.step(), ["a 1", "b 1"])


def test_a_decode_without_room_preempts_the_last_request() -> None:
    """Two requests of 2 blocks each fill 4 blocks; both want a third."""
    steps = Steps(blocks=5, max_num_seqs=4)
    steps.add(7), steps.add(7)
    steps.step()
    planned: list[str] = []
    for _ in range(5):
        planned = steps.step()
        if steps.preempted:
            break
    same("who is preempted, of a and b", steps.preempted, ["b"])
    same("that step", planned, ["a 1"])
