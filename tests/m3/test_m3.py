"""What m3 has besides blocks: its memory, its refusals, and the worked example of the interview question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common import Engine, SamplingParams, UserError
from common.plan import StepPlan
from tests.engine_checks import PAGED, TOKEN_BYTES, check, exactly, prompts_of, serve

Build = Callable[..., Engine]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_memory_formula_is_the_memory_allocated(build: Build, dtype: str) -> None:
    size = 4 if dtype == "float32" else 2
    engine = build("m3", dtype=dtype, block_size=16, kv_cache_memory=100_000, swap_space=20_000)
    block = 16 * 2 * 2 * 2 * 16 * size  # tokens, K and V, layers, KV heads, head dimension, bytes of a number
    kv = engine.runner.attention.kv
    assert kv.blocks.untyped_storage().nbytes() == engine.metrics()["kv_pool_bytes"] == 100_000 // block * block
    assert kv.cpu_blocks.untyped_storage().nbytes() == 20_000 // block * block


@pytest.mark.parametrize("stage", PAGED)
def test_no_more_memory_is_taken_than_max_num_seqs_requests_could_fill(build: Build, stage: str) -> None:
    engine = build(stage, max_num_seqs=2, max_model_len=33, block_size=16)
    assert engine.metrics()["kv_pool_bytes"] == 2 * 3 * 16 * TOKEN_BYTES


@pytest.mark.parametrize("stage", PAGED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size.*at least 1"),
        ({"block_size": 300}, "block_size must be a whole number of at least 1 and at most 256, not 300"),
        ({"block_size": 16.0}, "block_size.*whole number"),
        ({"swap_space": -1}, "swap_space.*at least 0"),
        ({"kv_cache_memory": 0}, "kv_cache_memory.*at least 1"),
        ({"kv_cache_memory": 16 * TOKEN_BYTES - 1}, "kv_cache_memory .8,191 bytes. holds no block of 8,192 bytes"),
        ({"scheduling_policy": "random"}, "scheduling_policy 'random'"),
    ],
)
def test_bad_options_are_refused_in_one_line(build: Build, stage: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(stage, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("swap_space", [0, 10**6])
@pytest.mark.parametrize("stage", PAGED)
def test_one_live_request_may_fill_the_pool_but_never_exhausts_it(build: Build, stage: str, swap_space: int) -> None:
    """20 tokens in 5 blocks of 4: prompt and output may fill them to the last slot; one token more can never run."""
    engine = build(stage, block_size=4, kv_cache_memory=5 * 4 * TOKEN_BYTES, swap_space=swap_space)
    for prompt in (1, 19, 20):
        with pytest.raises(UserError, match="21 tokens, are more than the whole KV cache holds") as refusal:
            engine.add_request(prompts_of([prompt])[0], exactly(21 - prompt))
        assert "\n" not in str(refusal.value)
    lengths = (1, 19, 13, 16)
    serve(engine, prompts_of(lengths), [exactly(20 - n) for n in lengths])


@pytest.mark.parametrize("stage", PAGED)
def test_swaps_and_copies_go_to_the_right_place(build: Build, stage: str) -> None:
    """The tensors themselves: out, in and copy, all layers, K and V."""
    engine = build(stage, block_size=4, kv_cache_memory=6 * 4 * TOKEN_BYTES, swap_space=4 * 4 * TOKEN_BYTES)
    kv = engine.runner.attention.kv
    kv.blocks.normal_()
    before = kv.blocks.clone()
    kv.move(StepPlan(swap_out=[(0, 3), (5, 0)]))
    assert torch.equal(kv.cpu_blocks[:, :, 3], before[:, :, 0]) and torch.equal(kv.cpu_blocks[:, :, 0], before[:, :, 5])
    kv.move(StepPlan(swap_in=[(3, 1), (0, 2)], copies=[(1, 4), (2, 1)]))
    now = kv.blocks
    assert torch.equal(now[:, :, 4], before[:, :, 0]), "copies come after swaps"
    assert torch.equal(now[:, :, 1], before[:, :, 5]), "all sources are read before anything is written"
    assert torch.equal(now[:, :, [0, 3, 5]], before[:, :, [0, 3, 5]])
    kv.move(StepPlan(swap_out=[(3, 1)], swap_in=[(1, 0)]))
    assert torch.equal(now[:, :, 0], before[:, :, 3]), "out comes before in"


@pytest.mark.parametrize("stage", PAGED)
def test_a_failed_step_ends_the_requests_that_it_should_have_swapped_out(
    build: Build, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Must not leave swapped requests with blocks that never moved."""
    engine = build(stage, block_size=4, kv_cache_memory=8 * 4 * TOKEN_BYTES, swap_space=10**6)
    for prompt in prompts_of([8, 8, 8]):
        engine.add_request(prompt, SamplingParams(max_tokens=20, ignore_eos=True))

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    engine.step()
    while not engine.metrics()["preemptions"]:
        plan = engine.scheduler.plan()
        assert plan is not None
        if plan.swap_out:
            swapped = plan.preempted[0]
            monkeypatch.setattr(engine.scheduler, "plan", lambda plan=plan: plan)
            monkeypatch.setattr(engine.runner, "_move_blocks", fail)
            with pytest.raises(RuntimeError, match="gone"):
                engine.step()
            break
        engine._deliver(engine.scheduler.update(plan, engine.runner.execute(plan)))
    monkeypatch.undo()
    assert swapped.finish_reason == "abort"
    while engine.has_unfinished:
        engine.step()
        check(engine)
    assert engine.metrics()["swapped"] == engine.metrics()["kv_reserved_bytes"] == 0
